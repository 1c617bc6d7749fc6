"""Nothing in a file runs: no pickle, no code beside a model, no name that leads elsewhere."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lamina.checkpoint.adapter import read_adapter, write_adapter
from lamina.cli.app import app
from lamina.errors import LaminaError
from lamina.interop.peft.facade import PeftModel as DropIn
from lamina.model import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from lamina.stages import begin_stage, lineage, load, save_stage
from lamina.stages.edit import rename_stage
from lamina.stages.flatten import flatten
from lamina.stages.merged import save_merged
from lamina.stages.split import split
from tests import models
from tests.stages.chains import CONFIG, WEIGHTS, fill_trainable, llama_lora, tensors_of

CODE = "import pathlib; pathlib.Path({mark!r}).write_text('it ran')\n"


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (CODE.format(mark=str(self.mark)),)


class Scene:
    """A stage on its base, both on the disk, and the file that shows that code has run."""

    def __init__(self, root: Path) -> None:
        self.mark = root / "mark"
        self.base, self.stage, self.out = root / "base", root / "stage", root / "out"
        model = models.tiny_llama()
        model.save_pretrained(self.base)
        model.name_or_path = str(self.base)
        stage = begin_stage(model, name="sft", config=llama_lora())
        fill_trainable(stage)
        save_stage(stage, self.stage)

    def code(self, path: Path) -> None:
        """Put a module there that shows that it was imported."""
        path.write_text(CODE.format(mark=str(self.mark)) + "class Evil: pass\n")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path)
    # Who is asked on the terminal whether code may run isn't asked by us, and would say yes.
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.chdir(made.stage)
    yield made
    assert not made.mark.exists()


def cli(*words: str) -> Callable[[Scene], object]:
    def run(scene: Scene) -> int:
        places = {"STAGE": scene.stage, "BASE": scene.base, "OUT": scene.out}
        ended = CliRunner().invoke(app, [str(places.get(word, word)) for word in words])
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return ended.exit_code

    return run


LIBRARY: dict[str, Callable[[Scene], object]] = {
    "read_adapter": lambda s: read_adapter(s.stage),
    "load": lambda s: load(s.stage, str(s.base)),
    "load on its base": lambda s: load(s.stage),
    "from_pretrained": lambda s: PeftModel.from_pretrained(models.tiny_llama(), s.stage),
    "auto": lambda s: AutoPeftModelForCausalLM.from_pretrained(s.stage),
    "drop-in": lambda s: DropIn.from_pretrained(models.tiny_llama(), str(s.stage)),
    "begin_stage": lambda s: begin_stage(
        models.tiny_llama(), name="next", parent=s.stage, mode="stack", config=llama_lora()
    ),
    "merge": lambda s: save_merged(s.stage, s.out, base=str(s.base)),
    "merge in memory": lambda s: save_merged(s.stage, s.out, base=str(s.base), streaming=False),
    "flatten": lambda s: flatten(s.stage, s.out, base=str(s.base)),
    "split": lambda s: split(s.stage, s.out),
    "edit": lambda s: rename_stage(s.stage, "sft", "other"),
    "lineage": lambda s: lineage(s.stage),
    "lamina inspect": cli("inspect", "STAGE"),
    "lamina doctor": cli("doctor", "STAGE", "--base", "BASE"),
    "lamina verify": cli("verify", "STAGE", "--base", "BASE"),
    "lamina targets": cli("targets", "BASE"),
    "lamina export": cli("export", "STAGE", "--for", "vllm", "-o", "OUT"),
    "lamina diff": cli("diff", "STAGE", "STAGE"),
}
EVERY_WAY = pytest.mark.parametrize("way", LIBRARY)


def attempt(scene: Scene, way: str) -> None:
    """Do it; errors of ours are welcome."""
    with suppress(LaminaError, OSError, ValueError):
        LIBRARY[way](scene)


def test_the_bombs_would_go_off(scene: Scene) -> None:
    pickle.loads(pickle.dumps(Bomb(scene.mark)))
    assert scene.mark.exists()
    scene.mark.unlink()


@EVERY_WAY
def test_a_pickle_in_an_adapter_does_not_run(scene: Scene, way: str) -> None:
    (scene.stage / WEIGHTS).unlink()
    torch.save({"x": Bomb(scene.mark)}, scene.stage / "adapter_model.bin")
    attempt(scene, way)


def test_a_pickle_is_refused_unless_it_is_asked_for_and_harmless(scene: Scene) -> None:
    tensors = tensors_of(scene.stage)
    (scene.stage / WEIGHTS).unlink()
    torch.save(tensors, scene.stage / "adapter_model.bin")
    with pytest.raises(LaminaError, match="opening a pickle can run"):
        read_adapter(scene.stage)
    assert read_adapter(scene.stage, allow_pickle=True).tensors.keys() == tensors.keys()
    torch.save({**tensors, "x": Bomb(scene.mark)}, scene.stage / "adapter_model.bin")
    with pytest.raises(LaminaError, match="can't be read as weights"):
        read_adapter(scene.stage, allow_pickle=True)


@EVERY_WAY
def test_a_pickle_in_a_base_does_not_run(scene: Scene, way: str) -> None:
    (scene.base / "model.safetensors").unlink()
    torch.save({"x": Bomb(scene.mark)}, scene.base / "pytorch_model.bin")
    attempt(scene, way)


@EVERY_WAY
def test_code_beside_a_model_does_not_run(scene: Scene, way: str) -> None:
    kinds = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForCausalLM")}
    settings = json.loads((scene.base / "config.json").read_text())
    settings |= {"auto_map": kinds, "model_type": "evil", "architectures": ["Evil"]}
    tokens = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    for folder in (scene.base, scene.stage):
        scene.code(folder / "evil.py")
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    config = json.loads((scene.stage / CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    (scene.stage / CONFIG).write_text(json.dumps(config))
    attempt(scene, way)


@EVERY_WAY
def test_code_for_a_tokenizer_alone_does_not_run(scene: Scene, way: str) -> None:
    tokens = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    for folder in (scene.base, scene.stage):
        scene.code(folder / "evil.py")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
        (folder / "tokenizer.json").write_text("{}")
    attempt(scene, way)


@pytest.mark.parametrize("architecture", ["pipeline", "Trainer", "set_seed", "os", "__class__"])
def test_an_architecture_is_only_ever_a_model(scene: Scene, architecture: str) -> None:
    settings = json.loads((scene.base / "config.json").read_text())
    settings["architectures"] = [architecture]
    (scene.base / "config.json").write_text(json.dumps(settings))
    for way in ("lamina doctor", "lamina targets", "merge", "lamina verify"):
        attempt(scene, way)
        shutil.rmtree(scene.out, ignore_errors=True)


# Names


NAMES = ["../../x", "/tmp/lamina-x", "..", "a/../../x", "nul\0byte", "n" * 300, "a\nb", "~"]


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_stages_never_become_paths_outside(scene: Scene, name: str) -> None:
    tensors = tensors_of(scene.stage)
    record = lineage(scene.stage)
    renamed = record.model_copy(
        update={
            "stages": tuple(s.model_copy(update={"name": name}) for s in record.stages),
            "laminae": tuple(x.model_copy(update={"stage": name}) for x in record.laminae),
        }
    )
    write_adapter(scene.stage, llama_lora(), tensors, renamed.to_metadata())
    root = scene.stage.parent
    before = everything(root)
    for way in ("split", "flatten", "edit", "load", "begin_stage", "lamina export"):
        attempt(scene, way)
        new = {path for path in everything(root) - before if not path.startswith("out")}
        assert not new, way
        shutil.rmtree(scene.out, ignore_errors=True)
    assert not os.path.lexists("/tmp/lamina-x")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_adapters_never_become_paths_outside(tmp_path: Path, name: str) -> None:
    out = tmp_path / "in" / "the" / "out"
    with suppress(LaminaError):
        model = get_peft_model(models.tiny_llama(), llama_lora(), adapter_name=name)
        model.save_pretrained(out)
    outside = [path for path in everything(tmp_path) if not "in/the/out".startswith(path[:10])]
    assert not outside
    assert not os.path.lexists("/tmp/lamina-x")


@pytest.mark.parametrize("inside", [False, True])
def test_a_shard_that_is_a_link_out_of_the_directory(tmp_path: Path, inside: bool) -> None:
    """The cache of the hub is made of links, so they are followed; what is read is only weights."""
    scene = Scene(tmp_path)
    shard = "adapter_model-00001-of-00001.safetensors"
    secret = tmp_path / "secret"
    if inside:
        shutil.move(scene.stage / WEIGHTS, secret)
    else:
        (scene.stage / WEIGHTS).unlink()
        secret.write_text("root:x:0:0")
    (scene.stage / shard).symlink_to(secret)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors_of_index(scene, secret), shard)}
    (scene.stage / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    if inside:
        assert read_adapter(scene.stage).tensors
        return
    with pytest.raises(LaminaError) as caught:
        read_adapter(scene.stage)
    # Nothing of another file's content gets into the message.
    assert "root:x" not in str(caught.value)


def tensors_of_index(scene: Scene, path: Path) -> list[str]:
    with suppress(Exception):
        return list(load_file(path))
    return ["x"]
