"""Any (workers, ZeRO stage, precision) to any other: the same bits, and the same curve afterwards.

The module has three parameter groups (one of a single element, of which most ranks hold only padding), a frozen layer,
a buffer, a layer and a head that are used twice, and odd sizes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dino_scale.checkpoint.manifest import read_manifest
from dino_scale.checkpoint.reshard import reshard
from tests.support.processes import run_ranks
from tests.support.reshard_matrix import Outcome, Topology, load_all, save_all

ALL: list[Topology] = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16_parameters") for stage in (1, 2, 3)]
Sources = dict[tuple[int, str], Outcome]  # (workers, folder)

# Losses after a change of topology. fp32: as in the contract. bf16: every microbatch's gradient is rounded in the same
# way on any number of workers, also on 3, over which DeepSpeed's averaging is no power of two.
FP32, BF16, ACROSS = 1e-5, 1e-4, 0.02

ROUNDING = 8  # numbers by which a share may be larger: groups and parameters are cut in multiples of the ranks


def save_everywhere(root: Path, plan: dict[int, list[Topology]]) -> tuple[Sources, dict[str, str]]:
    """Outcome of every source by its folder, and the precision that each folder was written in."""
    sources, precisions = {}, {}
    for world, topologies in plan.items():
        results = run_ranks(save_all, world, topologies, str(root / str(world)))
        assert all(result == results[0] for result in results), "ranks disagree"
        for topology, outcome in results[0].items():
            folder = str(root / str(world) / "{}-{}".format(*topology))
            sources[world, folder], precisions[folder] = outcome, topology[1]
            require_equal_shares(Path(folder), world)
    return sources, precisions


def require_equal_shares(folder: Path, world: int) -> None:
    """Every rank has written a file of its own, none much more than its share of the numbers."""
    manifest = read_manifest(folder / "step_00000007")
    numbers: Counter[str] = Counter()
    for pieces in manifest.pieces.values():
        for piece in pieces:
            numbers[piece.file] += piece.numel
    assert len(numbers) == world, numbers
    share = sum(numbers.values()) / world
    assert max(numbers.values()) <= share + ROUNDING, numbers


def require_same_state_and_curve(
    sources: Sources, precisions: dict[str, str], world: int, loaded: dict[tuple[Topology, str], Outcome]
) -> None:
    for (_, folder), source in sources.items():
        for (stage, precision), found in ((at, outcome) for (at, where), outcome in loaded.items() if where == folder):
            at = f"{folder} with {world} workers under ZeRO {stage} in {precision}"
            assert found.state == source.state, at
            if precision == precisions[folder]:
                assert found.losses == pytest.approx(source.losses, rel=tolerance(precision)), at
            else:  # from one precision to the other: near, and all stages go exactly the same way
                first = next(
                    outcome for (to, where), outcome in loaded.items() if where == folder and to[1] == precision
                )
                assert found.losses == pytest.approx(first.losses, rel=tolerance(precision)), at
                assert found.losses == pytest.approx(source.losses, rel=ACROSS), at


def tolerance(precision: str) -> float:
    return FP32 if precision == "fp32" else BF16


def require_bitwise_where_nothing_changed(
    sources: Sources, world: int, loaded: dict[tuple[Topology, str], Outcome]
) -> None:
    same = 0
    for (source_world, folder), source in sources.items():
        for (topology, where), found in loaded.items():
            if source_world == world and where == folder and Path(folder).name == "{}-{}".format(*topology):
                assert found == source, (world, topology)
                same += 1
    assert same == sum(source_world == world for source_world, _ in sources)


def test_some_topologies_to_some_others(tmp_path: Path) -> None:
    """Three workers to two: every stage is a source and a target, in both precisions; one checkpoint is recut too."""
    sources, precisions = save_everywhere(tmp_path, {3: ALL, 2: [(2, "bf16_parameters"), (1, "fp32")]})
    recut = tmp_path / "recut"
    ((folder, source),) = [(where, found) for (world, where), found in sources.items() if where.endswith("3/3-fp32")]
    reshard(Path(folder) / "step_00000007", recut / "step_00000007", 5)
    sources[3, str(recut)], precisions[str(recut)] = source, "fp32"
    results = run_ranks(load_all, 2, ALL, list(precisions))
    assert all(result == results[0] for result in results), "ranks disagree"
    require_same_state_and_curve(sources, precisions, 2, results[0])
    require_bitwise_where_nothing_changed(sources, 2, results[0])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, dict[str, str]]:
    return save_everywhere(tmp_path_factory.mktemp("matrix"), dict.fromkeys((1, 2, 3, 4), ALL))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_topology_to_every_other(everything: tuple[Sources, dict[str, str]], world: int) -> None:
    """28 sources to 28 targets: worlds 1 to 4, stages 0 to 3, fp32 and bf16 parameters with fp32 masters."""
    sources, precisions = everything
    results = run_ranks(load_all, world, ALL, list(precisions), timeout=500)
    assert all(result == results[0] for result in results), "ranks disagree"
    assert len(results[0]) == 28 * 7
    require_same_state_and_curve(sources, precisions, world, results[0])
    require_bitwise_where_nothing_changed(sources, world, results[0])
