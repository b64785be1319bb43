"""The model card: a README.md with YAML front matter out of a model's provenance. Nothing is looked up here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cookbook.models.folders import HUB_NAME
from cookbook.models.provenance import Provenance

__all__ = ["model_card"]

UNKNOWN = "unknown"

KEY_FIELDS = (
    "learning_rate",
    "lr_schedule",
    "epochs",
    "batch_size",
    "prompt_groups_per_step",
    "completions_per_prompt",
    "lora_rank",
    "max_seq_len",
    "max_completion_tokens",
    "train_on_what",
    "reward",
    "policy_loss",
    "advantage",
    "kl_beta",
    "temperature",
    "beta",
    "orpo_lambda",
)
"""Config fields that the card shows; all that change the numbers are in provenance.json."""

RECIPES = {
    "sft": "supervised fine-tuning (SFT)",
    "rl": "reinforcement learning (RL)",
    "dpo": "direct preference optimization (DPO)",
    "orpo": "odds-ratio preference optimization (ORPO)",
}


def model_card(
    provenance: Provenance, *, name: str, adapter: bool, base: str | None = None, notes: Sequence[str] = ()
) -> str:
    """The text of README.md.

    Args:
        provenance: of the model; unknown values are said to be unknown.
        name: title, and the folder that the code for loading names.
        adapter: whether the folder holds a LoRA adapter, which is loaded with peft on top of its base.
        base: an adapter's base model, as transformers loads it: a folder or hub name.
        notes: further sentences for the section "Limits".

    >>> print(model_card(Provenance("accounts/local/models/a", "foreign"), name="a", adapter=False).split("## ")[0])
    ---
    license: unknown
    library_name: transformers
    pipeline_tag: text-generation
    tags:
    - cookbook-flows
    ---
    <BLANKLINE>
    # a
    <BLANKLINE>
    A language model. How it was made is unknown.
    <BLANKLINE>
    <BLANKLINE>
    """
    sections = [
        _front_matter(provenance, adapter),
        f"# {name}\n\n{_what_it_is(provenance, adapter)}",
        *_training(provenance),
        f"## Where it comes from\n\n{_lineage(provenance)}",
        f"## Evaluation\n\n{_evaluation(provenance)}",
        f"## How to load it\n\n{_loading(name, adapter, base)}",
        "## Limits\n\n" + "\n".join(f"- {line}" for line in [*_limits(provenance), *notes]),
        f"## Licence\n\n{_licence(provenance)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(provenance: Provenance, adapter: bool) -> str:
    import yaml

    front: dict[str, Any] = {"license": (provenance.licence or UNKNOWN).lower()}
    if base := _base_name(provenance):
        front["base_model"] = base
    front |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    tags = ["cookbook-flows", provenance.recipe, "lora" if provenance.config.get("lora_rank") else None]
    front["tags"] = [tag for tag in tags if tag]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _base_name(provenance: Provenance) -> str | None:
    """The model that was trained, as others know it: a hub name whole, of anything else the last part."""
    known = [link for link in provenance.parents if link.origin != "unknown"]
    if known and provenance.init_from is None:
        return _short(known[0].model)
    return None if provenance.base_model is None else _short(provenance.base_model)


def _short(model: str) -> str:
    return model if HUB_NAME.fullmatch(model) or " " in model else model.rpartition("/")[2]


def _what_it_is(provenance: Provenance, adapter: bool) -> str:
    kind = "A LoRA adapter" if adapter else "A language model"
    if provenance.origin != "trained":
        how = f"It comes from {provenance.source}." if provenance.source else "How it was made is unknown."
        return f"{kind}. {how}"
    recipe = RECIPES.get(provenance.recipe or "", provenance.recipe or "an unknown recipe")
    base = _base_name(provenance)
    return f"{kind}, made from {_code(base)} by {recipe}."


def _training(provenance: Provenance) -> Iterator[str]:
    if provenance.origin != "trained":
        return
    config = {name: provenance.config[name] for name in KEY_FIELDS if provenance.config.get(name) is not None}
    rows = [
        ("run", provenance.run_id),
        ("checkpoint", provenance.checkpoint),
        ("optimizer steps", provenance.step),
        ("rows trained on", provenance.rows_consumed),
        ("seed", provenance.seed),
        *config.items(),
        ("began with", provenance.init_from or ("the base model's weights" if provenance.config else None)),
        ("config fingerprint", provenance.config_fingerprint),
        ("cookbook", provenance.code_version),
        ("packages", ", ".join(f"{name} {version}" for name, version in provenance.packages.items()) or None),
        ("made", provenance.created),
    ]
    yield "## Training\n\n" + _table(["", ""], rows)
    shared = provenance.shared()
    data = [
        ("data set", shared.dataset),
        ("rows", provenance.dataset_rows),
        ("sha256", provenance.dataset_sha256),
        ("fingerprint of the rows as trained", provenance.data_fingerprint),
    ]
    yield "## Data\n\n" + _table(["", ""], data)


def _lineage(provenance: Provenance) -> str:
    lines = []
    for link in provenance.shared().chain:
        how = RECIPES.get(link.recipe or "", link.recipe or UNKNOWN) if link.origin == "trained" else link.origin
        data = link.dataset if link.origin == "trained" else "-"
        lines.append((_code(_short(link.model)), how, data, link.source, link.licence))
    text = _table(["model", "how it was made", "data", "source", "licence"], lines)
    if provenance.base_fingerprint:
        text += f"\n\nThe base's config and weights have the sha256 fingerprint `{provenance.base_fingerprint}`."
    if not provenance.parents:
        return text
    limit = ", as far as that is known" if _has_unknown(provenance) else ""
    return f"{text}\n\nEach model was made from the one in the line below it{limit}."


def _has_unknown(provenance: Provenance) -> bool:
    return any(link.origin == "unknown" for link in provenance.parents)


def _evaluation(provenance: Provenance) -> str:
    if not (provenance.evaluation or provenance.evaluations):
        return "No evaluation of these weights was recorded."
    during = [_of_run(provenance)] if provenance.evaluation else []
    return "\n\n".join([*during, *(_of_eval(provenance, told) for told in provenance.shared().evaluations)])


def _of_run(provenance: Provenance) -> str:
    """What the run itself measured."""
    stages = list(provenance.evaluation)
    names = dict.fromkeys(name for values in provenance.evaluation.values() for name in values)
    rows = [(name, *(_number(provenance.evaluation[stage].get(name)) for stage in stages)) for name in names]
    table = _table(["held-out rows", *(f"{stage} training" for stage in stages)], rows)
    return f"{table}\n\nLosses are in nats a token; accuracies, matches and rewards are means."


def _of_eval(provenance: Provenance, told: Mapping[str, Any]) -> str:
    """One evaluation of `cookbook eval`, with its intervals."""
    count = told["samples_per_row"]
    each = "no answers" if count == 0 else "1 answer each" if count == 1 else f"{count} answers each"
    answers = each if count == 0 else f"{each} at temperature {told['temperature']:g}"
    reward = f", reward `{told['reward']}`" if told.get("reward") else ""
    is_trained = told["data_fingerprint"] == provenance.dataset_sha256
    text = (
        f"`cookbook eval`, {told['date']}, run {told['run_id']}: {told['num_rows']:,} rows of `{told['dataset']}` "
        f"(sha256 `{told['data_fingerprint']}`), {answers}{reward}. "
        + ("It is the file that the model was trained on. " if is_trained else "")
        + f"In brackets: {told['confidence']:.0%} bootstrap intervals over rows."
    )
    rows = [
        (name, _number(found["value"]), f"[{_number(found['low'])}, {_number(found['high'])}]")
        for name, found in told["measures"].items()
    ]
    return f"{text}\n\n{_table(['measure', 'value', 'interval'], rows)}"


def _loading(name: str, adapter: bool, base: str | None) -> str:
    chat = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True)\n"
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )
    if not adapter:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'folder = "{name}"  # where this folder lies\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        )
        return f"```python\n{load}{chat}```"
    load = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "{base or UNKNOWN}"  # where the base model lies\n'
        f'folder = "{name}"  # where this folder lies\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)\n"
    )
    where = "A folder in `base_model_name_or_path` of adapter_config.json is one of the machine that made the adapter."
    return f"```python\n{load}{chat}```\n\n{where} Use the same base: its line is in the table above."


def _limits(provenance: Provenance) -> Iterator[str]:
    if provenance.origin == "trained":
        yield f"It has the limits and biases of {_code(_base_name(provenance))}, and those of its training data."
    if provenance.evaluation or provenance.evaluations:
        yield "It was evaluated on the rows above and on nothing else; safety was not evaluated."
    else:
        yield "Neither its abilities nor its safety were evaluated."
    length = provenance.config.get("max_seq_len")
    if length:
        yield f"It was trained on rows of at most {length} tokens."


def _licence(provenance: Provenance) -> str:
    if provenance.licence is None:
        why = "of some weights behind it nothing is known" if _has_unknown(provenance) else "no model behind it says"
        return f"Unknown: {why}. Find out before you pass it on."
    if provenance.origin != "trained":
        return f"{provenance.licence}."
    by = next((link for link in provenance.parents if link.licence == provenance.licence), None)
    whose = f", that of {_code(_short(by.model))}, which it was made from" if by is not None else ""
    return f"{provenance.licence}{whose}. The training data may set terms of its own."


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return UNKNOWN
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4f}"


def _code(name: str | None) -> str:
    return f"`{name}`" if name else "an unknown model"
