"""`treeline profile`: what verification passes cost on this device."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cli.options import ConfigFile
from treeline.config_file import load_config


def profile(
    config: ConfigFile = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure even if a stored profile exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the curves as JSON.")] = False,
) -> None:
    """What the target's forward passes take, as a verifier uses it at its start.

    Measured once, on an otherwise idle machine if it is to be right, and kept in the cache folder.
    """
    verifier = load_config(config).verifier
    from lm.parallel import load_model
    from verifier_svc.service.profile_cache import verification_profile

    model = load_model(verifier.target)
    cache = model.new_cache(verifier.kv_cache_tokens, verifier.kv_block_tokens)
    curves = verification_profile(model, cache, refresh)
    if as_json:
        typer.echo(json.dumps([asdict(curve) for curve in curves]))
        return
    from cli.terminal import show_table

    headings = [f"sequences {curve.sequences}\ncontext {curve.context_tokens}" for curve in curves]
    columns = [dict(zip(curve.tokens, curve.seconds, strict=True)) for curve in curves]
    rows = [
        [str(tokens), *(f"{column[tokens] * 1e3:.1f}" if tokens in column else "" for column in columns)]
        for tokens in sorted(set().union(*columns))
    ]
    device = f"{str(model.dtype).removeprefix('torch.')}, {model.device}"
    show_table(f"{model.name}, {device}: milliseconds a pass", ["tokens", *headings], rows, names=0)
