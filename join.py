"""Joining the run of a flow: what distill.py and baselines.py share. Settings that are left out are the flow's."""

from dataclasses import Field, asdict, fields
from pathlib import Path

import data
import flm
import sources
from run import FREE, config_file, lasting, open_folder, parse, read_settings, say, setup, validate
from sources import UserError

MACHINES = {"bf16", "compile", "micro_batch_size", "loss_chunk"}  # the flow may have been trained on another one


def own(Config: type) -> set[str]:
    """The settings that are not the flow's: those that Config, a child of flm.Config, names, and those no run keeps."""
    return Config.__annotations__.keys() | FREE


def command_line(argv: list[str], Config: type, doc: str, preset: dict[str, dict]) -> tuple[dict, set[str]]:
    """The settings of a command line, a dict of Config's fields, and the names of the flags that were given. `preset` holds
    what a data set changes. The flow's text and network are no flags, nor is a field without a help text."""
    def defaults(f: Field) -> str | None:
        if not f.metadata["help"] or f.name in {f.name for f in fields(flm.Network)} - own(Config):
            return None
        return ("" if f.default is None else f"{f.default}") if f.name in own(Config) | MACHINES else "; ".join(
            ["the flow's"] + [f"{name}: {changed[f.name]}" for name, changed in preset.items() if f.name in changed])
    given = parse(argv, Config, doc, defaults)
    settings = asdict(Config()) | given
    validate(settings, Config)
    return settings, set(given)


def join(settings: dict, given: set[str], kind: str, Config: type, preset: dict[str, dict]):
    """Opens a run folder for another model K = `kind` beside its flow. Returns the settings, those of them that flm.train
    reads, the frozen flow, and its corpus. Raises UserError where the flow is missing, its text changed, or K.pt there."""
    folder, device = Path(settings["run_dir"]), setup(settings["device"], settings["threads"])
    flow = load_flow(folder / "flm.pt")
    text = text_of(folder)
    inherited = lasting(flow.config) | text | preset.get(text["dataset"], {})
    settings |= {name: value for name, value in inherited.items() if name not in own(Config) | MACHINES | given}
    config = Config(**open_folder(settings, given, kind, Config))
    flm.check(config)
    same = {f.name for f in fields(flm.Network)} - own(Config) - {"dataset", "data_dir"}
    if wrong := [name for name in same if getattr(config, name) != getattr(flow.config, name)]:
        raise UserError(f"{config_file(folder, kind)}: its {sorted(wrong)[0]} is not the flow's; --overwrite trains anew")
    training = flm.Config(**{f.name: getattr(config, f.name) for f in fields(flm.Config)})
    corpus = flm.corpus_for(training, device)
    check_text(flow, corpus, text["data_dir"] or text["dataset"])
    config.bf16 = flow.config.bf16 = training.bf16
    return config, training, flow.to(device), corpus


def load_flow(path: Path) -> flm.Transformer:
    """The frozen flow of a checkpoint. Raises UserError for a missing or unfit file, or another kind's."""
    model = flm.load(path)
    if model.kind != "flm":
        raise UserError(f"{path}: holds a {model.kind}, not a flow; give the flm.pt of a run of flm.py")
    if model.step < model.config.max_steps:
        say(f"{path}: is not finished, it has {model.step} of its {model.config.max_steps} steps")
    return model.requires_grad_(False)


def text_of(folder: Path) -> dict[str, str]:
    """The dataset and data_dir that the flow of a run was trained on. Raises UserError if they are not there."""
    settings = read_settings(folder, "flm", flm.Config)  # checkpoints keep only a name
    text = {name: settings[name] for name in ("dataset", "data_dir")}
    if not text["dataset"]:
        raise UserError(f"{folder}: was converted without a text; convert it again with --dataset lm1b or owt")
    try:
        sources.find(**text)
    except UserError:
        raise UserError(f"{text['data_dir'] or text['dataset']}: not there, and the flow in {folder} was trained on it; run "
                        "where it is, or put it back") from None
    return text


def check_text(model: flm.Transformer, corpus: data.Corpus, path: str) -> None:
    """Raises UserError if the corpus, the text at `path`, is not what the model was trained on, as far as that is known."""
    name = "flow" if model.kind == "flm" else model.kind
    source, tokenizer = corpus.meta["source"], corpus.tokenizer.checksum
    if (model.source or source, model.tokenizer.checksum) != (source, tokenizer):
        raise UserError(f"{path}: is no longer the text that the {name} was trained on; put that back, or train anew")
