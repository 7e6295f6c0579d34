"""Artifacts that are damaged or hostile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from spoiling import (
    DEEP,
    NORM,
    SITE,
    case,
    change_both,
    change_json,
    change_tensor,
    link,
    resealed,
)


def record(folder: Path, change: Callable[[dict[str, Any]], Any], command: str = "show coded") -> tuple[str, str]:
    change_json(folder / "coded" / "tersor.json", change)
    return command, "tersor.json"


@case
def record_nested_deeply(folder: Path) -> tuple[str, str]:
    """The record opens two hundred thousand lists."""
    (folder / "coded" / "tersor.json").write_text('{"version": ' + DEEP)
    return "show coded", "tersor.json"


@case
def record_no_utf8(folder: Path) -> tuple[str, str]:
    """The record is no UTF-8."""
    (folder / "coded" / "tersor.json").write_bytes(b'\xfe\xff{"version": 1}')
    return "show coded", "tersor.json"


@case
def record_of_another_version(folder: Path) -> tuple[str, str]:
    """The record is of a version that is to come."""
    return record(folder, lambda r: r.update(version=2))


@case
def record_without_a_plan(folder: Path) -> tuple[str, str]:
    """The record has no plan."""
    return record(folder, lambda r: r.pop("plan"))


@case
def record_of_negative_bytes(folder: Path) -> tuple[str, str]:
    """A choice of the plan takes fewer bytes than none."""
    return record(folder, lambda r: r["plan"]["choices"][0].update(stored=-5))


@case
def record_of_a_divergence_that_is_none(folder: Path) -> tuple[str, str]:
    """The divergence of the plan is NaN."""
    return record(folder, lambda r: r["plan"].update(divergence=float("nan")))


@case
def record_of_an_original_without_bytes(folder: Path) -> tuple[str, str]:
    """The original takes no bytes, by which shares are divided."""
    return record(folder, lambda r: r["model"].update(stored_bytes=0))


@case
def record_of_an_unknown_site(folder: Path) -> tuple[str, str]:
    """The plan has a site of which the record does not know the size."""
    return record(folder, lambda r: r["site_weights"].pop(SITE))


@case
def record_that_steers_the_terminal(folder: Path) -> tuple[str, str]:
    """The name of the model rings the bell."""
    return record(folder, lambda r: r["model"].update(source="\x07\x1b]0;title\x07"))


@case
def record_of_a_judgement_without_numbers(folder: Path) -> tuple[str, str]:
    """The judgement has a text in the place of a divergence."""
    return record(folder, lambda r: r["judgement"]["divergence"].update(value="small"))


@case
def record_linked_from_elsewhere(folder: Path) -> tuple[str, str]:
    """The record is a link that leads out of the folder."""
    shutil.move(folder / "coded" / "tersor.json", folder / "elsewhere.json")
    link(folder / "coded" / "tersor.json", folder / "elsewhere.json")
    return "show coded", "tersor.json"


@case
def record_of_a_file_elsewhere(folder: Path) -> tuple[str, str]:
    """The record names a file out of the folder, whose hash it would test."""
    return record(folder, lambda r: r["files"].update({"../text.txt": "0" * 64}), "verify coded")


@case
def record_of_another_plan(folder: Path) -> tuple[str, str]:
    """The plan of the record has other settings than its sites."""
    return record(folder, lambda r: r["plan"]["choices"][0]["setting"].update(step=9.0), "verify coded")


@case
def record_of_a_better_divergence(folder: Path) -> tuple[str, str]:
    """The record claims a divergence that the artifact does not reach."""
    claim = {"value": 1e-9, "low": 1e-10, "high": 1e-8}
    command = "verify coded --model model --data text.txt"
    return record(folder, lambda r: r["judgement"]["divergence"].update(claim), command)[0], "interval"


@case
def site_of_an_unknown_form(folder: Path) -> tuple[str, str]:
    """A site has a form that is none."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(form="__import__"))
    return "export coded new --to dense", "__import__"


@case
def site_of_an_absurd_setting(folder: Path) -> tuple[str, str]:
    """A site asks for factors of a petabyte."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(form="lowrank", setting={"rank": 1 << 50}))
    return "export coded new --to dense", SITE


@case
def site_of_a_setting_of_texts(folder: Path) -> tuple[str, str]:
    """A setting has a text in the place of a number."""
    change_both(folder / "coded", lambda sites: sites[SITE]["setting"].update(stored="all"))
    return "export coded new --to dense", "stored"


@case
def site_of_an_unknown_setting(folder: Path) -> tuple[str, str]:
    """A setting has a field that its form does not know."""
    change_both(folder / "coded", lambda sites: sites[SITE]["setting"].update(callback="os.system"))
    return "export coded new --to dense", "coded"


@case
def site_of_a_stack_of_settings(folder: Path) -> tuple[str, str]:
    """A site of one matrix has the settings of three."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(setting={"stack": [sites[SITE]["setting"]] * 3}))
    return "export coded new --to dense", SITE


@case
def site_that_the_model_lacks(folder: Path) -> tuple[str, str]:
    """A site is none of the model."""
    change_both(folder / "coded", lambda sites: sites.update(another=sites.pop(SITE)))
    change_json(folder / "coded" / "tersor.json", lambda r: r["site_weights"].update(another=10))
    return "export coded new --to dense", "another"


@case
def site_in_the_place_of_another(folder: Path) -> tuple[str, str]:
    """A site would be put into modules of other shapes."""
    change_both(
        folder / "coded", lambda sites: sites[SITE].update(places=[["model", "training"], ["lm_head", "weight"]])
    )
    return "export coded new --to dense", SITE


@case
def site_in_a_place_of_three_names(folder: Path) -> tuple[str, str]:
    """A place is no module and parameter."""
    change_both(folder / "coded", lambda sites: sites[SITE].update(places=[["a", "b", "c"]]))
    return "export coded new --to dense", "places"


@case
def layout_of_a_list(folder: Path) -> tuple[str, str]:
    """The sites in the config are a list."""
    change_json(folder / "coded" / "config.json", lambda c: c["quantization_config"].update(sites=[1, 2]))
    return "export coded new --to dense", "artifact"


@case
def artifact_of_other_weights(folder: Path) -> tuple[str, str]:
    """A weight was changed after the artifact was written."""
    change_tensor(folder / "coded" / "model.safetensors", NORM, lambda t: t + 1)
    return "verify coded", "model.safetensors"


@case
def artifact_of_another_config(folder: Path) -> tuple[str, str]:
    """The config was changed after the artifact was written."""
    change_json(folder / "coded" / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    return "verify coded", "config.json"


@case
def artifact_with_nan(folder: Path) -> tuple[str, str]:
    """A weight that was left as it was is NaN."""
    change_tensor(folder / "coded" / "model.safetensors", NORM, lambda t: t.fill_(float("nan")))
    resealed(folder / "coded")
    return "export coded new --to dense", NORM


@case
def artifact_without_a_tensor(folder: Path) -> tuple[str, str]:
    """The stream of a site is not there."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda _: None)
    return "judge coded --model model --data text.txt", f"{SITE}.operator.stream"


@case
def artifact_with_a_strange_tensor(folder: Path) -> tuple[str, str]:
    """There is a tensor that the model does not know."""
    path = folder / "coded" / "model.safetensors"
    save_file({**load_file(path), "strange": torch.zeros(4)}, path, {"format": "pt"})
    return "export coded new --to dense", "strange"


@case
def stream_of_another_dtype(folder: Path) -> tuple[str, str]:
    """A stream is kept as floating-point numbers."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda t: t.float())
    return "export coded new --to dense", f"{SITE}.operator.stream"


@case
def stream_cut_short(folder: Path) -> tuple[str, str]:
    """A stream is shorter than its setting says."""
    change_tensor(folder / "coded" / "model.safetensors", f"{SITE}.operator.stream", lambda t: t[:-9].contiguous())
    return "export coded new --to dense", f"{SITE}.operator.stream"


def spoiled_stream(folder: Path, form: str, at: int, value: int) -> tuple[str, str]:
    def change(stream: torch.Tensor) -> torch.Tensor:
        stream[at] = value
        return stream

    change_tensor(folder / form / "model.safetensors", f"{SITE}.operator.stream", change)
    resealed(folder / form)
    return f"verify {form}", "model.safetensors"


@case
def coded_stream_of_noise(folder: Path) -> tuple[str, str]:
    """A byte in the middle of a coded stream is another, and the hashes were made right again."""
    return spoiled_stream(folder, "coded", 1000, 7)


@case
def coded_stream_of_another_shape(folder: Path) -> tuple[str, str]:
    """The header of a coded stream claims more rows."""
    return spoiled_stream(folder, "coded", 4, 0xFF)


@case
def trellis_stream_of_noise(folder: Path) -> tuple[str, str]:
    """A byte in the middle of a trellis stream is another, and the hashes were made right again."""
    return spoiled_stream(folder, "trellis", 900, 7)[0], SITE


@case
def trellis_stream_of_another_kind(folder: Path) -> tuple[str, str]:
    """A trellis stream does not begin as one."""
    return spoiled_stream(folder, "trellis", 0, 0)[0], SITE


@case
def artifact_with_an_index(folder: Path) -> tuple[str, str]:
    """The weights of an artifact lie in a file that an index names."""
    shutil.move(folder / "coded" / "model.safetensors", folder / "coded" / "other.safetensors")
    (folder / "coded" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    return "export coded new --to dense", "model.safetensors"


@case
def artifact_judged_against_another_model(folder: Path) -> tuple[str, str]:
    """The original is another model."""
    change_tensor(folder / "model" / "model.safetensors", NORM, lambda t: t * 2)
    return "judge coded --model model --data text.txt", "another model"


@case
def artifact_verified_on_other_data(folder: Path) -> tuple[str, str]:
    """The data are not those that the artifact was judged on."""
    (folder / "other.txt").write_text("abc abc abc\n" * 20)
    return "verify coded --model model --data other.txt", "other.txt"


@case
def artifact_compressed_again(folder: Path) -> tuple[str, str]:
    """An artifact is given in the place of a model."""
    return "compress coded --data text.txt --budget 50% --out new", "quantised already"
