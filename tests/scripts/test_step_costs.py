"""The contenders of scripts/step_costs.py, and its table; the measurement itself takes minutes."""

from scripts.step_costs import GROUPS, SIMCLR, Turn, config, rows


def test_each_contender_is_another_configuration_that_never_saves():
    contenders = [SIMCLR, *(each for group in GROUPS.values() for each in group)]
    cfgs = [config(each) for each in contenders]
    assert len({str((cfg.method, cfg.objective, cfg.support, cfg.projector)) for cfg in cfgs}) == len(contenders)
    assert all(cfg.checkpoint.every >= cfg.epochs == 1_000_000 for cfg in cfgs)


def test_ratios_are_of_turns_in_the_same_round():
    """In round 2 the machine is twice as slow for everybody, which no median of times would survive."""
    turns = {SIMCLR: [Turn(1.0), Turn(2.0), Turn(1.0)], "dearer": [Turn(1.5), Turn(3.0), Turn(1.4)]}
    assert rows(turns) == [["`dearer`", "1.50", "1.40 to 1.50"]]
