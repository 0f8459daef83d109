"""What a training run writes, so that it can be killed at any moment: its checkpoint, its log, its result.

    checkpoint.pt   weights, AdamW's moments, step, and the settings that the losses depend on
    log.csv         a row for each logged step
    result.json     log, scores and circumstances of a finished run

A file is written under a temporary name, then renamed, which the operating system does as a whole or not at all.
"""

import csv
import dataclasses
import io
import json
import os
import platform
import sys
import zipfile
from datetime import date

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from minimamba import processes
from minimamba._results import device_name
from minimamba.baselines import Transformer
from minimamba.language_model import MambaConfig, MambaLM

COLUMNS = ("step", "bytes", "seconds", "lr", "gradient_norm", "train_bits", "held_out_bits")
MODELS = ("mamba", "transformer")
CONTENT = {"model", "optimizer", "settings", "step", "seconds"}
# The state of a model and its optimizer, however many processes it is spread over: whole tensors, on the CPU.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(path, model, optimizer, settings, step, seconds):
    """Write all that is needed to go on after `step`. A kill at any moment leaves the old file or the new, whole."""
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)  # all processes take part
    content = {"model": weights, "optimizer": moments, "settings": settings, "step": step, "seconds": seconds}
    if processes.rank_and_count()[0] == 0:
        replace(path, lambda file: torch.save(content, file))


def load_checkpoint(path, model, optimizer, settings):
    """Put a checkpoint into the model and the optimizer. Return its step and its seconds of training.

    Raises ValueError, which names the file, if it is damaged or was made with other settings; nothing is loaded then.
    """
    content = read_checkpoint(path)
    theirs = content["settings"]
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(f"{name}: expected {theirs.get(name)!r}, as in {path}, got {value!r}")
    set_state_dict(
        model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"], options=WHOLE
    )
    return content["step"], content["seconds"]


def make_model(settings, device=None):
    """Return the model of a run's settings, with weights drawn anew."""
    fields = {field.name for field in dataclasses.fields(MambaConfig)}
    config = MambaConfig(**{name: value for name, value in settings.items() if name in fields})
    if settings["model"] == "mamba":
        return MambaLM(config, device)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MambaLM(config).parameters())
    return Transformer(config, parameters, device)


def load_model(path):
    """Return the model of a checkpoint, on the CPU."""
    content = read_checkpoint(path)
    model = make_model(content["settings"])
    model.load_state_dict(content["model"])
    return model


def read_checkpoint(path):
    """Return what `save_checkpoint` wrote. Every byte is checked: `torch.load` alone lets flipped bits pass."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save's format, with a checksum for each part
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True) if damaged is None else None
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of any kind: it depends on which byte is wrong
        content, damaged = None, error
    if isinstance(content, dict) and content.keys() == CONTENT:
        return content
    why = f"damaged ({damaged})" if damaged else "no checkpoint of a training run"
    raise ValueError(f"checkpoint: expected a whole file, got {path}, which is {why}; nothing was loaded")


def replace(path, write):
    """Give write(file) a temporary file, then rename it to `path`: a reader sees the old content or all of the new."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_log(path, done):
    """Return the rows of log.csv up to step `done`; a line that a kill cut short is no row."""
    if not done or not path.exists():
        return []
    lines = io.StringIO(path.read_text().rpartition("\n")[0])
    rows = [{name: json.loads(value or "null") for name, value in row.items()} for row in csv.DictReader(lines)]
    return [row for row in rows if row["step"] <= done]


def write_log(path, rows):
    """Make log.csv anew with these rows."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace(path, lambda file: file.write(table.getvalue().encode()))


def append_row(path, row):
    """Add one row at the end of log.csv."""
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def write_result(path, result, device):
    """Write result.json: what was measured, and on what and by which command."""
    about = {
        "device": device_name(device.type),
        "processes": processes.rank_and_count()[1],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": "python -m minimamba.training " + " ".join(sys.argv[1:]),
    }
    if device.type == "cuda":
        about["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()  # of one process
    replace(path, lambda file: file.write((json.dumps(about | result, indent=1) + "\n").encode()))
