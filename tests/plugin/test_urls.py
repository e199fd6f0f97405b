"""Save directories behind URLs: a real server on loopback that speaks S3, and fsspec's own memory."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import boto3
import pytest
import torch
import torch.distributed as dist
from botocore.exceptions import EndpointConnectionError
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from safetensors.torch import load

from lightning_zero import Fp32Export, ZeroCheckpoint, ZeroCheckpointIO, ZeroStrategy
from lightning_zero import convert_zero_checkpoint_to_fp32_state_dict as convert
from lightning_zero import get_fp32_state_dict_from_zero_checkpoint as get_fp32
from lightning_zero.checkpoint import commit, finish, remote, storage
from lightning_zero.checkpoint import save as saving
from lightning_zero.checkpoint.load import Checkpoint
from lightning_zero.checkpoint.resolution import resolve
from lightning_zero.checkpoint.storage import locate
from lightning_zero.cli import main
from lightning_zero.errors import (
    CheckpointNotFoundError,
    CheckpointWriteError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from lightning_zero.plugin import loading
from lightning_zero.plugin.checkpoint_io import PREPARED, PreparedSave
from tests.checkpoint.sample import Sample
from tests.launch import distributed, free_port, run_ranks
from tests.models import fit
from tests.plugin.test_checkpoints import assert_same, train
from tests.plugin.test_exports import Change

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield environment
    server.stop()


@pytest.fixture
def url(server, request):
    return f"s3://bucket/{abs(hash(request.node.name))}"


@pytest.fixture(params=["s3", "memory"])
def any_url(request, url):
    return url if request.param == "s3" else url.replace("s3://bucket", "memory:/")


def keys(url):
    prefix = url.removeprefix("s3://bucket/")
    listed = boto3.client("s3").list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])
    return sorted(item["Key"].removeprefix(prefix).lstrip("/") for item in listed)


def with_environment(body, environment, *args, **kwargs):
    os.environ |= environment
    return body(*args, **kwargs)


def train_there(environment, *args, **kwargs):
    os.environ |= environment
    return train(*args, **kwargs)


def test_a_run_on_s3_is_resumed_exactly_and_on_another_number_of_ranks(server, url):
    options = {"process_group": False, "timeout_seconds": 240}
    whole = run_ranks(train_there, 2, server, f"{url}/whole", 2, max_steps=6, every=100, **options)
    run_ranks(train_there, 2, server, f"{url}/cut", 2, max_steps=3, every=3, **options)
    assert get_fp32(f"{url}/cut")["into.weight"].dtype == torch.float32
    resumed = run_ranks(train_there, 2, server, f"{url}/cut", 2, max_steps=6, every=2, resume=True, **options)
    for a, b in zip(whole, resumed, strict=True):
        assert a["losses"][3:] == b["losses"]
        assert_same(a["state_dict"], b["state_dict"])
    alone = run_ranks(train_there, 1, server, f"{url}/cut", 1, max_steps=8, every=100, resume=True, **options)[0]
    assert len(alone["losses"]) == 2
    assert {key.split("/")[0] for key in keys(f"{url}/cut")} == {"latest", "step=3.ckpt", "step=4.ckpt", "step=6.ckpt"}


def keep_and_export(environment, url, file, behind):
    os.environ |= environment
    callback = ZeroCheckpoint(url, every_n_train_steps=1, keep_last=2, async_save=behind)
    top = ModelCheckpoint(f"{url}/top", monitor="val_loss", save_top_k=1, filename="{epoch}")
    io = ZeroCheckpointIO(verify="full")
    fit(
        strategy=ZeroStrategy(checkpoint_io=io),
        world_size=2,
        max_steps=9,
        callbacks=[callback, top, Fp32Export(file)],
    )
    model, trainer = fit(
        strategy=ZeroStrategy(checkpoint_io=io), world_size=2, max_steps=10, ckpt_path=f"{url}/step=9.ckpt"
    )
    assert trainer.global_step == 10
    assert len(model.losses) == 1


@pytest.mark.parametrize("behind", [False, True])
def test_retention_and_top_k_and_the_command_work_on_s3(server, url, tmp_path, behind, capsys):
    file = tmp_path / "model.ckpt"
    run_ranks(keep_and_export, 2, server, url, file, behind, process_group=False, timeout_seconds=240)
    there = keys(url)
    assert {key.split("/")[0] for key in there} == {"latest", "step=8.ckpt", "step=9.ckpt", "top"}
    assert len({key.split("/")[1] for key in there if key.startswith("top/")} - {"latest"}) == 1
    assert len([key for key in there if key.startswith("step=9.ckpt/rank-")]) == 2
    assert file.exists()
    assert main(["ls", url]) == 0
    assert main(["verify", url]) == 0
    assert main(["export", url, str(tmp_path / "other.ckpt")]) == 0
    assert "step=9.ckpt" in capsys.readouterr().out
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (file, tmp_path / "other.ckpt"))
    assert_same(a, b)


def weights(path):
    with locate(path).open("rb") as file:
        content = file.read()
    return torch.load(io.BytesIO(content), weights_only=True)["state_dict"] if "ckpt" in str(path) else load(content)


def test_an_export_is_written_to_a_url(any_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(any_url, "tag", world_size=2)
    here, there = tmp_path / "out", f"{any_url}/out"
    for name in ("m.ckpt", "m.safetensors"):
        for output in (here / name, f"{there}/{name}", f"file://{tmp_path}/by_url/{name}"):
            assert main(["export", any_url, str(output)]) == 0
        assert_same(weights(here / name), weights(f"{there}/{name}"))
        assert_same(weights(here / name), weights(tmp_path / "by_url" / name))
        convert(any_url, f"{there}/{name}", dtype="bf16")  # replaces it
        assert weights(f"{there}/{name}")["bias"].dtype == torch.bfloat16
    (locate(there) / "hf" / "config.json").write_text("{}")
    convert(any_url, here / "hf", max_shard_size="1KB")
    convert(any_url, f"{there}/hf", max_shard_size="1KB")
    assert names(locate(there) / "hf") == sorted(["config.json", *os.listdir(here / "hf")])
    for name in os.listdir(here / "hf"):
        assert (locate(there) / "hf" / name).read_bytes() == (here / "hf" / name).read_bytes()
    with pytest.raises(FileExistsError, match="give a new folder"):
        convert(any_url, f"{there}/hf", max_shard_size="1KB")
    assert sorted(os.listdir(tmp_path)) == ["by_url", "out"]


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors", "hf"])
def test_an_export_to_a_url_that_fails_leaves_what_was_there(any_url, name):
    size = {"max_shard_size": "1KB"} if name == "hf" else {}
    save(any_url, "tag", step=1)
    if name == "hf":
        (locate(any_url) / "out" / "hf" / "config.json").write_text("{}")
    else:
        convert(any_url, f"{any_url}/out/{name}")
    out = locate(f"{any_url}/out")
    before = {path: out.fs.cat_file(path) for path in out.fs.find(out.path)}
    assert len(before) == 1
    written = []

    def fail(nbytes):
        written.append(nbytes)
        if len(written) == 5:
            raise IncompleteCheckpointError("in the middle")

    with pytest.raises(IncompleteCheckpointError, match="in the middle"):
        convert(any_url, f"{any_url}/out/{name}", progress=fail, **size)
    assert {path: out.fs.cat_file(path) for path in out.fs.find(out.path)} == before


def fit_and_export_there(environment, url, changed):
    os.environ |= environment
    more = [Change()] if changed else []
    exports = [Fp32Export(f"{url}/at{{step}}.safetensors", every_n_checkpoints=1), Fp32Export(f"{url}/model.ckpt")]
    checkpoint = ZeroCheckpoint(f"{url}/ckpts", every_n_train_steps=2)
    model, _ = fit(strategy=ZeroStrategy(), world_size=2, max_steps=2, callbacks=[*more, *exports, checkpoint])
    return dict(model.state_dict())


@pytest.mark.parametrize("changed", [False, True])
def test_the_callback_exports_to_a_url(server, url, changed):
    expected = run_ranks(fit_and_export_there, 2, server, url, changed, process_group=False, timeout_seconds=240)[0]
    assert_same(weights(f"{url}/model.ckpt"), expected)
    assert bool((weights(f"{url}/at2.safetensors")["into.weight"] == 7).all()) == changed
    assert {key.split("/")[0] for key in keys(url)} == {"ckpts", "at2.safetensors", "model.ckpt"}


def test_where_nothing_can_be_written_an_export_says_so(tmp_path, capsys):
    save(tmp_path, "tag")
    assert main(["export", str(tmp_path), "https://127.0.0.1:1/m.ckpt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "lightning-zero: [Errno 30] https://127.0.0.1:1/m.ckpt can't be written to"


def save(url, tag, **options):
    sample = Sample(**options)
    sample.save(locate(url) / tag)
    return sample


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_tag_is_replaced_by_its_manifest_and_what_nothing_names_goes(any_url):
    first = save(any_url, "tag", step=1)
    before = names(locate(any_url) / "tag")
    second = save(any_url, "tag", step=2)
    after = names(locate(any_url) / "tag")
    assert set(before) & set(after) == {"manifest.json"}
    loaded = Checkpoint(resolve(any_url), verify="full").state_dict()
    for name, tensor in second.state_dict.items():
        assert torch.equal(loaded[name], tensor)
    assert not torch.equal(loaded["bias"], first.state_dict["bias"])


@pytest.mark.parametrize("at", ["write_shard", "manifest", "latest", "sweep"])
def test_a_save_that_ends_anywhere_leaves_the_checkpoint_before_or_the_new_one(any_url, at):
    save(any_url, "one", step=1)
    save(any_url, "tag", step=2)

    class Stopped(BaseException):
        """As good as a kill: nothing of ours handles it."""

    def stop(*args, **kwargs):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        if at == "write_shard":
            patch.setattr(saving, "_write_trainer", stop)
        elif at == "manifest":
            patch.setattr(finish, "_commit", stop)
        elif at == "latest":
            patch.setattr(remote, "write_whole", stop)
        else:
            patch.setattr(remote, "remove_what_nothing_names", stop)
        with pytest.raises(Stopped):
            save(any_url, "tag", step=3)
    checkpoint = Checkpoint(resolve(any_url), verify="full")
    assert checkpoint.manifest.step == (2 if at in ("write_shard", "manifest") else 3)
    assert [tag.name for tag in commit.list_tags(locate(any_url)) if tag.complete] == ["tag", "one"]
    save(any_url, "tag", step=4)
    assert Checkpoint(resolve(any_url), verify="full").manifest.step == 4
    assert len(names(locate(any_url) / "tag")) == 4


def test_a_failed_save_takes_its_objects_away_and_a_dead_ones_go_after_a_day(any_url):
    save(any_url, "one", step=1)
    with pytest.MonkeyPatch.context() as patch:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        patch.setattr(saving, "_write_trainer", full)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            save(any_url, "two", step=2)
    assert names(locate(any_url)) == ["latest", "one"]
    torn = locate(any_url) / "torn"
    (torn / "rank-00000-of-00001-0123456789abcdef.safetensors").write_bytes(b"half")
    for data in ("data/rank-00000-of-00001-0123456789abcdef.safetensors", "data/mine.txt", "one/notes.txt"):
        (locate(any_url) / data).write_bytes(b"precious")
    remote.remove_stale(locate(any_url), 3600)
    assert (torn / "rank-00000-of-00001-0123456789abcdef.safetensors").exists()
    assert [tag.complete for tag in commit.list_tags(locate(any_url)) if tag.name == "torn"] == [False]
    time.sleep(1.1)  # S3 knows whole seconds
    remote.remove_stale(locate(any_url), 0.05)
    assert names(locate(any_url)) == ["data", "latest", "one"]
    assert len(names(locate(any_url) / "data")) == 2
    save(any_url, "one", step=1)
    assert "notes.txt" in names(locate(any_url) / "one")
    assert Checkpoint(resolve(any_url), verify="full").manifest.step == 1


def test_what_is_damaged_there_is_found_and_passed_over(any_url):
    save(any_url, "one", step=1, world_size=2)
    save(any_url, "two", step=2, world_size=2)
    shard = next(path for path in (locate(any_url) / "two").iterdir() if path.name.startswith("rank-00001"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(IncompleteCheckpointError, match="rank-00001"):
        Checkpoint(locate(any_url) / "two")
    with pytest.warns(UserWarning, match="newest sound checkpoint is taken instead"):
        assert resolve(any_url).name == "one"
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match="newest sound checkpoint is taken instead"):
        assert resolve(any_url, verify="full").name == "one"
    assert main(["verify", any_url]) == 1
    with pytest.raises(CheckpointNotFoundError, match="three"):
        resolve(any_url, "three")
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        resolve(f"{any_url}/nowhere")


def test_what_fails_after_the_commit_takes_nothing_away(any_url):
    save(any_url, "tag", step=1)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise OSError(5, "Input/output error")

        patch.setattr(remote, "write_whole", refuse)
        with pytest.raises(CheckpointWriteError, match="Input/output error"):
            save(any_url, "tag", step=2)
    assert Checkpoint(resolve(any_url), verify="full").manifest.step == 2


def test_where_the_store_does_not_tell_for_a_moment_nothing_is_taken_away(any_url, monkeypatch):
    save(any_url, "one", step=1)
    save(any_url, "tag", step=2)
    open_file = storage.open_file

    def refuse(*args, **kwargs):
        raise IncompleteCheckpointError("busy") from OSError(errno.EBUSY, "Reduce your request rate")

    def open_or_refuse(location):
        return refuse() if location.name in refused else open_file(location)

    with monkeypatch.context() as patch:
        refused = ["latest"]
        patch.setattr(storage, "open_file", open_or_refuse)
        with pytest.raises(CorruptCheckpointError, match="busy"):
            commit.remove_tag(locate(any_url), "tag")
    assert Checkpoint(resolve(any_url), verify="full").manifest.step == 2

    def refuse_from_now_on(*args, **kwargs):
        refused.append("manifest.json")
        raise OSError(errno.EBUSY, "Reduce your request rate")

    with monkeypatch.context() as patch:
        refused = []
        patch.setattr(storage, "open_file", open_or_refuse)
        patch.setattr(remote, "write_whole", refuse_from_now_on)
        with pytest.raises(CheckpointWriteError, match="request rate"), pytest.warns(match="couldn't be removed"):
            save(any_url, "tag", step=3)
    assert Checkpoint(resolve(any_url), verify="full").manifest.step == 3


class Kill(Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 4:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finish, "_commit", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
                trainer.save_checkpoint(f"{trainer.checkpoint_callback.dirpath}/step=2.ckpt")


SCRIPT = """
import sys
from lightning_zero import ZeroCheckpoint, ZeroStrategy
from tests.models import fit
from tests.plugin.test_urls import Kill
callbacks = [ZeroCheckpoint(sys.argv[1], every_n_train_steps=2, save_top_k=-1)]
callbacks += [Kill()] if sys.argv[2] == "kill" else []
model, _ = fit(strategy=ZeroStrategy(), world_size=1, max_steps=6, callbacks=callbacks, ckpt_path="last")
print(len(model.losses))
"""


def test_a_killed_run_is_resumed_from_what_latest_names(server, url):
    def run(mode):
        command = [sys.executable, "-c", SCRIPT, url, mode]
        environment = {**os.environ, **server, "MASTER_PORT": str(free_port())}  # none that a connection may be given
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert run("kill").returncode == -signal.SIGKILL
    done = run("resume")
    assert done.stdout.split()[-1] == "4", done.stderr
    assert (locate(url) / "latest").read_text() == "step=6.ckpt"


@distributed(world_size=1, process_group=False)
def test_frozen_parameters_are_copied_by_the_store_itself():
    from tests.plugin.test_frozen import Adapted

    url = "memory://frozen"
    written = []
    with pytest.MonkeyPatch.context() as patch:
        write_shard = saving.write_shard
        patch.setattr(
            saving, "write_shard", lambda path, *a, **k: written.append(path.name) or write_shard(path, *a, **k)
        )
        callback = ZeroCheckpoint(url, every_n_train_steps=1, save_top_k=-1)
        fit(Adapted(), world_size=1, max_steps=3, callbacks=[callback])
    assert len([name for name in written if name.startswith("frozen-")]) == 1
    for step in (1, 2, 3):
        Checkpoint(f"{url}/step={step}.ckpt", verify="full")


class Fetched(Callback):
    """How many bytes of the model this rank reads from where they are stored: to resume, and to load into the fit."""

    def setup(self, trainer, module, stage):
        self.nbytes, read = [0], Checkpoint.read

        def counting(reader, stored, offset_bytes, target):
            self.nbytes[-1] += len(target) * (stored[1].kind == "model")
            read(reader, stored, offset_bytes, target)

        Checkpoint.read = counting

    def on_train_start(self, trainer, module):
        self.resumed = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad():
            for value in module.state_dict().values():
                value.zero_()
        self.nbytes.append(0)
        trainer.strategy.load_zero_checkpoint(trainer.ckpt_path)
        self.loaded = {name: value.clone() for name, value in module.state_dict().items()}


def resume_and_count(environment, url, precision):
    os.environ |= environment
    loading._PIECE_NUMEL = 100
    fetched, options = Fetched(), {"strategy": "zero_stage_2", "world_size": 2, "precision": precision}
    saved, _ = fit(max_steps=2, callbacks=[ZeroCheckpoint(url, every_n_train_steps=2)], **options)
    _, trainer = fit(max_steps=3, callbacks=[fetched], ckpt_path=url, **options)
    assert trainer.global_step == 3
    return fetched.nbytes, dict(saved.state_dict()), fetched.resumed, fetched.loaded


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_of_a_model_behind_a_url_every_byte_is_fetched_by_one_rank(server, url, precision):
    ranks = run_ranks(resume_and_count, 2, server, url, precision, process_group=False, timeout_seconds=240)
    manifest = Checkpoint(resolve(url)).manifest
    stored = [tensor for file in manifest.files for tensor in file.tensors if tensor.kind == "model"]
    trained = {entry.name for entry in manifest.entries if entry.role == "parameter"}
    masters = sum(tensor.nbytes for tensor in stored if tensor.name in trained) if precision == "bf16-true" else 0
    nbytes = [rank[0] for rank in ranks]
    assert [sum(both) for both in zip(*nbytes, strict=True)] == [sum(t.nbytes for t in stored) + masters] * 2
    assert all(min(of_rank) > masters // 2 for of_rank in nbytes)
    for _, _, resumed, loaded in ranks:
        assert_same(ranks[0][1], resumed)
        assert_same(ranks[0][1], loaded)


@pytest.mark.parametrize("away", ["before", "meanwhile"])
def test_a_save_whose_store_is_away_for_one_rank_fails_on_all(server, url, away):
    run_ranks(save_without_a_store, 2, server, url, away)


def save_without_a_store(environment, url, away):
    os.environ |= environment
    rank, io, sample, write = dist.get_rank(), ZeroCheckpointIO(), Sample(world_size=2), saving._write_file
    group = dist.new_group(timeout=timedelta(seconds=20))

    def call(*args, **kwargs):
        raise EndpointConnectionError(endpoint_url=environment["AWS_ENDPOINT_URL"])

    def go_away():
        S3FileSystem._call_s3 = S3FileSystem.call_s3 = call

    def save(tag):
        shared = sample.shared if rank == 0 else None
        options = {"update_latest": True, "behind": False, "group_behind": None, "tag_validation": "fail"}
        prepared = PreparedSave(sample.rank(rank), shared, group, place=None, began=time.perf_counter(), **options)
        io.save_checkpoint({PREPARED: prepared}, f"{url}/{tag}")

    def write_without(*args, **kwargs):
        if rank == 0:
            go_away()
        return write(*args, **kwargs)

    save("one")
    io = ZeroCheckpointIO()
    if away == "meanwhile":
        saving._write_file = write_without
    elif rank == 1:
        go_away()
    with pytest.raises(CheckpointWriteError, match=rf"rank {int(away == 'before')} on .*Could not connect"):
        save("two")


def test_ranks_of_which_one_cannot_fetch_fail_together(server, url):
    run_ranks(fail_to_fetch, 2, server, url, process_group=False, timeout_seconds=240)


def fail_to_fetch(environment, url):
    os.environ |= environment
    fit(strategy=ZeroStrategy(), world_size=2, max_steps=1, callbacks=[ZeroCheckpoint(url, every_n_train_steps=1)])

    class Unplugged(Callback):
        def setup(self, trainer, module, stage):
            if trainer.global_rank == 1:
                Checkpoint.read = self.read

        def read(self, *args):
            raise IncompleteCheckpointError("the network is gone")

    with pytest.raises(IncompleteCheckpointError, match=r"rank 1: the network is gone"):
        fit(strategy=ZeroStrategy(), world_size=2, max_steps=2, callbacks=[Unplugged()], ckpt_path=url)
