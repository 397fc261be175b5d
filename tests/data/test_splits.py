import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.splits import Split, class_balanced_subset, held_out_tenth, stratified_split

labels_of_any_kind = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(torch.tensor)
seeds = st.integers(0, 2**32)


@given(labels_of_any_kind, st.floats(0, 0.99), seeds)
def test_stratified_split_is_a_partition_in_proportion(labels, fraction, seed):
    rest, held_out = stratified_split(labels, fraction, seed)

    assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(len(labels)))
    assert torch.equal(rest, rest.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    assert len(held_out) <= round(len(labels) * fraction)
    for label in labels.unique():
        count = int((labels == label).sum())
        held = int((labels[held_out] == label).sum())
        assert abs(held - count * fraction) <= 1 or held == count - 1
        assert held < count


def test_stratified_split_holds_out_the_fraction_where_classes_divide_unevenly():
    labels = torch.arange(10).repeat(13)  # a tenth of each class is 1.3
    assert len(stratified_split(labels, 0.1, seed=0)[1]) == 13


def test_what_does_not_divide_goes_to_the_largest_remainders_and_among_equal_ones_by_the_seed():
    labels = torch.tensor([0] * 13 + [1] * 17 + [2] * 20)  # a tenth of the classes is 1.3, 1.7 and 2
    counts = [labels[stratified_split(labels, 0.1, seed)[1]].bincount().tolist() for seed in range(20)]
    assert counts == [[1, 2, 2]] * 20
    equal = torch.arange(10).repeat(13)
    assert len({tuple(equal[held_out_tenth(equal, seed)[1]].bincount().tolist()) for seed in range(20)}) > 1


def test_stratified_split_of_cifar_takes_fifty_a_class():
    labels = torch.arange(100).repeat(500)
    _, held_out = stratified_split(labels, 0.1, seed=0)
    assert torch.equal(labels[held_out].bincount(), torch.full((100,), 50))


@given(labels_of_any_kind, seeds, st.data())
def test_balanced_subset_levels_the_classes(labels, seed, data):
    limit = data.draw(st.integers(0, len(labels)))
    rows = class_balanced_subset(labels, limit, seed)

    assert len(rows) == len(rows.unique()) == limit
    available = labels.bincount()
    taken = labels[rows].bincount(minlength=len(available))
    level = int(taken.max())
    short_of_it = taken < level - 1
    assert torch.equal(taken[short_of_it], available[short_of_it])  # a class gives less only if it has no more


@given(labels_of_any_kind, seeds, st.data())
def test_balanced_subsets_are_nested(labels, seed, data):
    small, large = sorted(data.draw(st.tuples(*[st.integers(0, len(labels))] * 2)))
    subset = class_balanced_subset(labels, small, seed).tolist()
    assert set(subset) <= set(class_balanced_subset(labels, large, seed).tolist())


def test_balanced_subset_spreads_the_remainder_by_seed():
    labels = torch.arange(10).repeat(20)
    fuller = {tuple(labels[class_balanced_subset(labels, 25, seed)].bincount().tolist()) for seed in range(20)}
    assert all(set(counts) == {2, 3} for counts in fuller)
    assert len(fuller) > 1


@pytest.mark.parametrize(
    "select", [lambda x, seed: stratified_split(x, 0.3, seed)[1], lambda x, s: class_balanced_subset(x, 40, s)]
)
def test_selection_is_a_function_of_the_seed(select):
    labels = torch.arange(10).repeat(20)
    assert torch.equal(select(labels, 1), select(labels, 1))
    assert not torch.equal(select(labels, 1), select(labels, 2))


def test_selection_leaves_the_global_generator_alone():
    labels = torch.arange(10).repeat(20)
    before = torch.get_rng_state()
    stratified_split(labels, 0.1, 0)
    class_balanced_subset(labels, 30, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_parts_keep_images_and_labels_together_and_copy_nothing():
    split = Split(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), torch.arange(6))
    part = split.take(torch.tensor([5, 2, 0])).take(torch.tensor([2, 0]))
    assert part.images.flatten().tolist() == part.labels.tolist() == [0, 5]
    assert part.store is split.store
    assert part.to("cpu") is part
    assert (len(part), part.nbytes) == (2, 2)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_blocks_are_the_whole_in_order(size):
    split = Split(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1), torch.arange(9)).take(torch.arange(1, 6))
    blocks = list(split.blocks(size))
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert torch.cat([block.images for block in blocks]).flatten().tolist() == [1, 2, 3, 4, 5]
    assert torch.cat([block.labels for block in blocks]).tolist() == [1, 2, 3, 4, 5]
