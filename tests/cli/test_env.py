"""``ppo-fast env``."""

from __future__ import annotations

import re

import torch
from command_line import flat

from ppo_fast.cli.main import main
from ppo_fast.ops.backends.impls import COMPILED


def test_env_lists_every_op_and_why(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 3:
            rows[cells[0]] = cells[1:]
    assert set(COMPILED) <= set(rows)
    for op in COMPILED:
        implementation, why = rows[op]
        assert implementation in ("reference", "cpp", "triton")
        assert why


def test_env_says_which_fast_paths_a_policy_can_take(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["env", "--policy", "model"])
    out = flat(capsys.readouterr().out)
    for path in ("fused LM head", "1 of 1 layers fused", "products of few rows"):
        assert f"{path} yes" in out
    assert "frozen trunk no num_layers_unfrozen: got 1" in out, "its one layer is all that there is"
