"""Exported folders: they load with what others use, and compute what the trainer computed."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cookbook.cli import app
from cookbook.errors import ModelError
from cookbook.models import load_tokenizer, resolve_model
from cookbook.models.export import card_of, export_model
from cookbook.models.merge import _rounded
from cookbook.models.provenance import read_provenance
from tests.models.promoted import PROBE, make_promoted
from tests.tiny_model import make_tiny_model

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def adapter(backend, start_trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "lora"
    return make_promoted(backend, start_trainer, folder, lora_rank=4, model_id="exp-lora")


@pytest.fixture(scope="module")
def full(backend, start_trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "full"
    return make_promoted(backend, start_trainer, folder, lora_rank=0, model_id="exp-full")


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([PROBE])).logits[0]


def logprobs(model):
    """float32 (len(PROBE) - 1,): of the probe's tokens, each given those before it."""
    table_TV = torch.log_softmax(logits(model).float(), dim=-1)
    return table_TV[torch.arange(len(PROBE) - 1), torch.tensor(PROBE[1:])].numpy()


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_merged_adapter_gives_the_trainers_logprobs(adapter, tmp_path):
    exported = export_model("exp-lora", tmp_path / "out", home=adapter.home)
    assert (exported.format, exported.dtype) == ("merged", "float32")
    assert exported.size_bytes == sum(path.stat().st_size for path in exported.folder.iterdir())
    merged = load(exported.folder)
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(logprobs(merged), adapter.logprobs, atol=1e-5)
    base = logprobs(load(adapter.home / "models" / "tiny"))
    assert np.abs(base - adapter.logprobs).max() > 0.1  # else the test would show nothing
    assert files(exported.folder) == {
        *TOKENIZER_FILES,
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
    }
    # The base's end-of-turn ids and chat template came along.
    assert json.loads((exported.folder / "generation_config.json").read_text())["eos_token_id"] == [257, 259]
    assert load_tokenizer(str(exported.folder), adapter.home / "models").chat_template
    # The adapter trained the head, which the base ties to its embedding.
    assert "lm_head.weight" in load_file(exported.folder / "model.safetensors")


def test_an_exported_adapter_loads_with_peft_and_gives_the_same_logits_as_the_merged_model(adapter, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    warnings.simplefilter("ignore", FutureWarning)  # peft's own
    warnings.simplefilter("ignore", UserWarning)  # on tied weights; nothing is merged here
    exported = export_model(adapter.model.name, tmp_path / "out", home=adapter.home, format="adapter")
    assert (exported.format, exported.dtype) == ("adapter", "float32")
    assert files(exported.folder) >= {*TOKENIZER_FILES, "adapter_config.json", "adapter_model.safetensors"}
    model = PeftModel.from_pretrained(load(adapter.home / "models" / "tiny"), exported.folder).eval()
    np.testing.assert_allclose(logprobs(model), adapter.logprobs, atol=1e-5)
    merged = load(export_model("exp-lora", tmp_path / "merged", home=adapter.home).folder)
    torch.testing.assert_close(logits(model), logits(merged), atol=1e-4, rtol=0)
    by_its_own_config = AutoPeftModelForCausalLM.from_pretrained(exported.folder).eval()
    assert torch.equal(logits(by_its_own_config), logits(model))


def test_a_full_model_is_exported_as_it_was_promoted(full, tmp_path):
    exported = export_model("exp-full", tmp_path / "out", home=full.home)
    assert (exported.format, exported.dtype) == ("merged", "bfloat16")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (exported.folder / name).read_bytes() == (full.model.folder / name).read_bytes()
    assert torch.equal(logits(load(exported.folder)), logits(load(full.model.folder)))
    # bfloat16 has 8 bits: the trainer's own float32 weights are near.
    np.testing.assert_allclose(logprobs(load(exported.folder, dtype=torch.float32)), full.logprobs, atol=0.2)


def test_another_dtype_is_one_for_weights_and_config(full, adapter, tmp_path):
    wide = export_model("exp-full", tmp_path / "wide", home=full.home, dtype="float32")
    assert wide.dtype == "float32"
    assert load(wide.folder).dtype == torch.float32
    assert torch.equal(logits(load(wide.folder)), logits(load(full.model.folder, dtype=torch.float32)))
    narrow = export_model("exp-lora", tmp_path / "narrow", home=adapter.home, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(narrow.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert load(narrow.folder).dtype == torch.bfloat16
    assert "was merged into its base in float32 and rounded to bfloat16" in (narrow.folder / "README.md").read_text()
    np.testing.assert_allclose(logprobs(load(narrow.folder, dtype=torch.float32)), adapter.logprobs, atol=0.2)


def test_what_an_adapter_adds_survives_the_rounding_to_bfloat16():
    base = torch.full((4096,), 1.0)
    added = 2**-11  # an eighth of the distance to the next bfloat16 above 1
    assert ((base + added).to(torch.bfloat16) == 1).all()
    assert _rounded(base + added, torch.bfloat16).double().mean().item() == pytest.approx(1 + added, rel=2e-4)
    assert torch.equal(_rounded(base, torch.bfloat16).float(), base)
    assert torch.equal(_rounded(base + added, torch.bfloat16), _rounded(base + added, torch.bfloat16))


def test_a_run_directory_stands_for_the_model_it_promoted(full, tmp_path):
    exported = export_model(str(full.log_path), tmp_path / "by-record", home=full.home)
    assert exported.model == "exp-full"
    run = tmp_path / "run"
    shutil.copytree(full.log_path, run)
    (run / "summary.json").write_text(json.dumps({"model": full.model.name}))
    assert export_model(str(run), tmp_path / "by-summary", home=full.home).model == "exp-full"
    (run / "summary.json").write_text(json.dumps({"model": "accounts/acme/models/far"}))
    with pytest.raises(ModelError, match=r"accounts/acme/models/far is a model on Fireworks.*firectl"):
        export_model(str(run), tmp_path / "far", home=full.home)
    (run / "summary.json").unlink()
    (run / "run.json").write_text('{"run_id": "sft-none", "recipe": "sft"}')
    with pytest.raises(ModelError, match=r"run sft-none in .* has promoted no model"):
        export_model(str(run), tmp_path / "none", home=full.home)


def test_an_exported_folder_is_a_base_model_again_and_keeps_its_chain(adapter, tmp_path):
    exported = export_model("exp-lora", tmp_path / "out", home=adapter.home)
    assert resolve_model(str(exported.folder), tmp_path) == exported.folder
    found = read_provenance(tmp_path / "another-home", str(exported.folder))
    assert (found.model, found.kind, found.step) == (adapter.model.name, "model", 3)
    assert [parent.model for parent in found.parents] == ["accounts/local/models/tiny"]
    again = export_model(str(exported.folder), tmp_path / "again", home=tmp_path / "another-home")
    assert (again.folder / "model.safetensors").read_bytes() == (exported.folder / "model.safetensors").read_bytes()
    put = tmp_path / "another-home" / "models" / "mine"
    shutil.copytree(exported.folder, put)
    assert read_provenance(tmp_path / "another-home", "mine").model == "accounts/local/models/mine"


def test_only_known_files_are_exported_and_no_pickle(tmp_path):
    model = make_tiny_model(tmp_path / "models" / "tiny")
    for name in ("pytorch_model.bin", "modeling_evil.py", "tokenizer.pkl", "optimizer.pt", "model.json"):
        (model / name).write_text("{}")
    exported = export_model("tiny", tmp_path / "out", home=tmp_path)
    assert files(exported.folder) == {
        *TOKENIZER_FILES,
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
    }


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("tiny", {"format": "gguf"}, "format must be one of auto, merged, adapter, got 'gguf'"),
        ("tiny", {"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, got 'int4'"),
        ("tiny", {"format": "adapter"}, "tiny is a whole model, not an adapter. Export it as merged"),
        ("absent", {}, "no model 'absent'"),
        ("someone/some-model", {}, "A model of the hub needs no export"),
        ("accounts/acme/models/x", {}, "is a model on Fireworks"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(tmp_path, model, options, message):
    make_tiny_model(tmp_path / "models" / "tiny")
    with pytest.raises(ModelError, match=message):
        export_model(model, tmp_path / "deep" / "out", home=tmp_path, **options)
    assert not (tmp_path / "deep").exists()


def test_an_adapter_takes_no_dtype_and_needs_its_base(adapter, tmp_path):
    with pytest.raises(ModelError, match="an adapter keeps the dtype"):
        export_model("exp-lora", tmp_path / "out", home=adapter.home, format="adapter", dtype="bfloat16")
    lonely = tmp_path / "home" / "models" / "lonely"
    shutil.copytree(adapter.model.folder, lonely)
    config = json.loads((lonely / "adapter_config.json").read_text())
    (lonely / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/tiny"}))
    with pytest.raises(ModelError, match="the base model of the adapter lonely is not on this machine"):
        export_model("lonely", tmp_path / "out", home=tmp_path / "home")
    (lonely / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lonely has no adapter_model\.safetensors"):
        export_model("lonely", tmp_path / "out", home=tmp_path / "home")


def test_an_adapter_that_does_not_fit_its_base_is_one_error(adapter, tmp_path):
    wrong = tmp_path / "models" / "wrong"
    shutil.copytree(adapter.model.folder, wrong)
    base = make_tiny_model(tmp_path / "models" / "wide", hidden_size=96)
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    record = json.loads((wrong / "model.json").read_text())
    (wrong / "model.json").write_text(json.dumps(record | {"base_model": str(base)}))
    with pytest.raises(ModelError, match="cannot be merged into"):
        export_model("wrong", tmp_path / "out", home=tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_an_empty_folder_will_do(tmp_path):
    make_tiny_model(tmp_path / "models" / "tiny")
    (tmp_path / "out").mkdir()
    export_model("tiny", tmp_path / "out", home=tmp_path)
    before = (tmp_path / "out" / "README.md").read_bytes()
    with pytest.raises(ModelError, match="out is not empty, and nothing in it is overwritten"):
        export_model("tiny", tmp_path / "out", home=tmp_path)
    assert (tmp_path / "out" / "README.md").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file is a file"):
        export_model("tiny", tmp_path / "file", home=tmp_path)
    with pytest.raises(ModelError, match=r"below cannot be written: File exists\. Free space there, or give"):
        export_model("tiny", tmp_path / "file" / "below", home=tmp_path)


def test_a_folder_that_was_exported_elsewhere_has_its_own_tokenizer(tmp_path):
    home = tmp_path / "home"
    other = make_tiny_model(home / "models" / "theirs")  # named as the tokenizer that the record tells of
    (other / "tokenizer_config.json").write_text("{}")
    folder = make_tiny_model(tmp_path / "theirs")
    for config in ({"tokenizer_model": "theirs"}, {"tokenizer_model": "someone/evil"}, {"deployment": {}}):
        record = {"model": "accounts/local/models/x", "origin": "trained", "config": config}
        (folder / "provenance.json").write_text(json.dumps(record))
        exported = export_model(str(folder), tmp_path / "out", home=home).folder
        assert (exported / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
        shutil.rmtree(exported)


def test_the_tokenizer_that_a_run_of_this_home_was_given_is_exported(full, tmp_path):
    other = make_tiny_model(tmp_path / "other")
    (other / "chat_template.jinja").write_text("another template")
    record_path = full.home / "provenance" / "exp-full.json"
    before = record_path.read_text()
    record = json.loads(before)
    record_path.write_text(json.dumps(record | {"config": record["config"] | {"tokenizer_model": str(other)}}))
    try:
        exported = export_model("exp-full", tmp_path / "out", home=full.home).folder
    finally:
        record_path.write_text(before)
    assert (exported / "chat_template.jinja").read_text() == "another template"


def test_a_source_that_cannot_be_read_is_not_told_as_a_full_disk(adapter, tmp_path, monkeypatch):
    home = tmp_path / "home"
    folder = make_tiny_model(home / "models" / "tiny")
    weights = folder / "model.safetensors"
    opened = Path.open

    def refuse(path, *arguments, **options):  # root reads a file whatever its permissions are
        if path == weights:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: Permission denied"):
            export_model("tiny", tmp_path / "out", home=home)
    weights.write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read: .*header"):
        export_model("tiny", tmp_path / "out", home=home)
    shutil.copytree(adapter.model.folder, home / "models" / "tuned")
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    (home / "models" / "tuned" / "model.json").write_text('{"base_model": "tiny"}')
    with pytest.raises(ModelError, match="cannot be merged into"):
        export_model("tuned", tmp_path / "out", home=home)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(adapter, tmp_path):
    folder = make_tiny_model(tmp_path / "models" / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = -70000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"weight model\.norm\.weight has 70000, too large for float16"
    with pytest.raises(ModelError, match=message):
        export_model("tiny", tmp_path / "out", home=tmp_path, dtype="float16")
    shutil.copytree(adapter.model.folder, tmp_path / "models" / "tuned")
    (tmp_path / "models" / "tuned" / "model.json").write_text('{"base_model": "tiny"}')
    with pytest.raises(ModelError, match=message):
        export_model("tuned", tmp_path / "out", home=tmp_path, dtype="float16")
    assert not (tmp_path / "out").exists()
    assert export_model("tiny", tmp_path / "out", home=tmp_path, dtype="bfloat16").dtype == "bfloat16"


# killed half-way ----------------------------------------------------------------------------------------------------


def start_and_hold(tmp_path):
    """An export in a process of its own that stands still when it has written its tokenizer."""
    make_tiny_model(tmp_path / "models" / "tiny")
    code = (
        "import sys, shutil, time; from cookbook.cli import main; copy = shutil.copyfile\n"
        "def slow(source, target):\n"
        "    copy(source, target)\n"
        "    if str(source).endswith('tokenizer.json'): time.sleep(60)\n"
        "shutil.copyfile = slow; sys.argv = ['cookbook', 'export', 'tiny', '--to', 'out', '--home', '.']; main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".export-out-*/tokenizer.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_export_that_is_killed_leaves_nothing_under_its_name(tmp_path, number, status):
    process = start_and_hold(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.glob(".export-*"))
    assert bool(left) == (number == signal.SIGKILL)
    export_model("tiny", tmp_path / "out", home=tmp_path)  # takes away what a killed one left
    assert (tmp_path / "out" / "README.md").is_file()
    assert list(tmp_path.glob(".export-*")) == []


def test_an_export_that_is_at_work_is_left_alone_by_another(tmp_path):
    process = start_and_hold(tmp_path)
    try:
        export_model("tiny", tmp_path / "out", home=tmp_path)
        assert len(list(tmp_path.glob(".export-out-*"))) == 1
    finally:
        process.kill()
        process.communicate()


# the card -----------------------------------------------------------------------------------------------------------


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def python_of(card):
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_the_card_says_what_is_known_and_its_code_works(adapter, tmp_path, format):
    folder = export_model("exp-lora", tmp_path / "out", home=adapter.home, format=format).folder
    card = (folder / "README.md").read_text()
    front = front_matter(card)
    assert front == {
        "license": "unknown",
        "base_model": "tiny",
        "library_name": "peft" if format == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cookbook-flows", "sft", "lora"],
    }
    run_id = json.loads((adapter.log_path / "run.json").read_text())["run_id"]
    for line in (
        "# out",
        "made from `tiny` by supervised fine-tuning (SFT)",
        f"| run | {run_id} |",
        "| optimizer steps | 3 |",
        "| lora_rank | 4 |",
        "| data set | rows.jsonl |",
        "| fingerprint of the rows as trained | data-fingerprint |",
        "| held-out rows | before training | after training |",
        "| loss | 5.5000 | 0.2500 |",
        "| num_rows | - | 4 |",
        "Unknown: no model behind it says.",
    ):
        assert line in card, line
    assert str(adapter.log_path.parent) not in card
    code = python_of(card).replace("max_new_tokens=100", "max_new_tokens=3")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_known_licence_is_in_front_and_says_whose_it_is(tmp_path):
    base = make_tiny_model(tmp_path / "models" / "base")
    (base / "model.json").write_text('{"licence": "Apache-2.0", "source": "somewhere"}')
    tuned = make_tiny_model(tmp_path / "models" / "tuned", seed=1)
    source = "accounts/local/rlorTrainerJobs/dpo-0a1b2c3d-policy-g1/checkpoints/step-4-00000000"
    (tuned / "model.json").write_text(json.dumps({"source": source, "base_model": "accounts/local/models/base"}))
    provenance, card = card_of("tuned", tmp_path)
    assert front_matter(card)["license"] == "apache-2.0"
    assert "Apache-2.0, that of `base`, which it was made from." in card
    assert "made from `base` by direct preference optimization (DPO)" in card
    assert "| run | dpo-0a1b2c3d |" in card
    assert "| optimizer steps | unknown |" in card
    assert "No evaluation of these weights was recorded." in card
    assert provenance.licence == "Apache-2.0"


def test_the_command_exports_and_shows_cards(adapter, tmp_path):
    def cookbook(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--home", str(adapter.home)])
        return result.exit_code, result.stdout, result.stderr

    status, out, _ = cookbook("export", "exp-lora", "--to", str(tmp_path / "out"), "--format", "adapter", "--json")
    assert status == 0
    assert json.loads(out)["folder"] == str(tmp_path / "out")
    status, out, err = cookbook("export", "exp-lora", "--to", str(tmp_path / "out"))
    assert (status, out) == (2, "")
    assert "is not empty" in err
    status, out, err = cookbook("export", "exp-lora", "--to", str(tmp_path / "merged"))
    assert (status, out) == (0, f"{tmp_path / 'merged'}\n")
    assert "licence unknown" in err
    status, out, _ = cookbook("models", "card", str(adapter.log_path))
    assert status == 0
    assert out.startswith("---\nlicense: unknown\n")
    status, out, _ = cookbook("models", "card", "exp-lora", "--json")
    assert (status, json.loads(out)["step"]) == (0, 3)
    assert cookbook("models", "card", "nothing")[0] == 2
