"""Two language models as names and shapes: nothing here ever has memory for a parameter."""

from lightning_zero.segments import ParameterSpec

VOCABULARY = 128256


def llama(layers: int, width: int, key_width: int, inner: int) -> list[ParameterSpec]:
    """The tensors of a Llama: grouped-query attention, a gated feed-forward, no biases, an output of its own; bf16."""
    of_layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (key_width, width),
        "self_attn.v_proj": (key_width, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {
        "model.embed_tokens": (VOCABULARY, width),
        **{f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in of_layer.items()},
        "model.norm": (width,),
        "lm_head": (VOCABULARY, width),
    }
    return [ParameterSpec(f"{name}.weight", shape, 2) for name, shape in shapes.items()]


MODELS = {
    "70B": llama(80, 8192, 1024, 28672),  # Llama 3 70B
    "1T": llama(128, 25600, 3200, 81920),  # the same made wider and deeper, until it has 10^12 parameters
}
