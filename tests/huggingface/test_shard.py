"""What `SequenceParallel.shard` takes and returns: every way to say where documents are, and every kind of target."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from batches import IGNORED, KINDS, Documents, draw, gradients, learn_alone, packed, padded, shifted, whole
from families import VOCABULARY, build
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from learning import GRADIENT, assert_learned, assert_same_gradients, assert_same_loss, learn_family, over_ranks
from torch.distributed.device_mesh import init_device_mesh

from ringflash import Partition
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.transformers import SequenceParallel
from ringflash.transformers.batches import fingerprints


def _assert_learns(pool, ranks, documents, family="llama", of_model=False, **options):
    """The ranks learn what one device learns from the documents alone."""
    model = build(family, "eager")
    loss = learn_alone(model, documents)
    results = pool(ranks).run(learn_family, family, documents.batch, **options)
    assert_learned(results, loss, gradients(model), of_model)


# Any batch


@st.composite
def _batches(sample):
    """Rows of documents, packed or padded, some of whose tokens are not learned."""
    rows, length = sample(st.integers(1, 3)), sample(st.integers(6, 40))
    form = sample(st.sampled_from(["left", "right", "positions", "boundaries"]))
    if form in ("left", "right"):
        lengths = sample(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
        documents = padded(draw(*lengths, seed=length), form)
    else:
        rows = 1 if form == "boundaries" else rows
        cuts = [sorted(sample(st.sets(st.integers(1, length - 1), max_size=4))) for _ in range(rows)]
        lengths = [[b - a for a, b in zip([0, *row], [*row, length], strict=True)] for row in cuts]
        ids = iter(draw(*(n for row in lengths for n in row), seed=length))
        documents = packed([[next(ids) for _ in row] for row in lengths], boundaries=form == "boundaries")
    return _with_some_learned(documents, sample(st.integers(0, 999)), sample(st.sampled_from([0.1, 0.5, 1.0])))


def _with_some_learned(documents, seed, share):
    """The same, with labels at a share of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    labels = documents.batch["labels"]
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) >= share, IGNORED)
    return _with_labels(documents, labels)


def _with_labels(documents, labels):
    """The same with other labels; which document each lies in is read off by the real tokens' order."""
    real = documents.batch.get("attention_mask", torch.ones_like(labels)).bool()
    parts = labels[real].split([len(x) for x in documents.ids])
    return Documents(documents.batch | {"labels": labels}, documents.ids, [shifted(x) for x in parts])


@pytest.mark.parametrize("ranks", [2, 3])
@settings(max_examples=25)
@given(documents=_batches(), data=st.data())
def test_any_batch_is_learned_from_as_on_one_device(pool, ranks, documents, data):
    assume(documents.batch["labels"].shape[1] >= ranks)  # fewer tokens are refused
    packed_row = len(documents.batch["labels"]) == 1  # what "balanced" takes
    partition = data.draw(st.sampled_from(["zigzag", "contiguous", "balanced"][: 2 + packed_row]))
    assume(documents.valid)
    _assert_learns(pool, ranks, documents, "mistral", of_model=True, partition=partition)


@pytest.mark.parametrize("length", [3, 5, 7])
def test_sequences_hardly_longer_than_the_ranks_are_many(pool, length):
    _assert_learns(pool, 3, whole(draw(length)), of_model=True)


def test_a_partition_of_ones_own_is_followed(pool):
    mine = Partition(11, (((0, 1), (4, 9)), ((1, 4), (9, 11))))
    _assert_learns(pool, 2, whole(draw(11, 11)), partition=mine)


# Ways to say the same


def _forms():
    """Batches that hold the same three documents, two of which are packed."""
    documents = KINDS["packed_with_boundaries"]()
    batch = documents.batch
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor([19, 1, 30, 11]))[None].int()
    boundaries = {key: batch[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    tokens = {key: batch[key] for key in ("input_ids", "labels")}
    targets = {"input_ids": batch["input_ids"], "shift_labels": torch.cat(documents.targets)[None]}
    positions = {"position_ids": batch["position_ids"]}
    yield "boundaries_alone", documents, tokens | boundaries
    yield "numbers_alone", documents, tokens | {"seq_idx": numbers}
    yield "everything", documents, batch | {"seq_idx": numbers}
    yield "shift_labels", documents, targets | positions
    left, right = KINDS["left_padded"](), KINDS["right_padded"]()
    for name, documents in (("left", left), ("right", right)):
        mask = documents.batch["attention_mask"]
        counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate() and TRL number padded tokens
        yield f"{name}_padded_with_positions", documents, documents.batch | {"position_ids": counted}
        yield f"{name}_padded_by_booleans", documents, documents.batch | {"attention_mask": mask.bool()}
    yield (
        "nothing_padded",
        KINDS["one_document"](),
        KINDS["one_document"]().batch | {"attention_mask": torch.ones(2, 37, dtype=torch.int64)},
    )


FORMS = {name: Documents(batch, documents.ids, documents.targets) for name, documents, batch in _forms()}


@pytest.mark.parametrize("form", FORMS)
def test_each_way_to_say_the_same_is_understood(pool, form):
    _assert_learns(pool, 2, FORMS[form], "mistral")


def _embedded(batch):
    """Embeddings that were looked up before the model was called, which learn too."""
    model = build("llama", "ring")
    sequence = SequenceParallel(model)
    batch = dict(batch)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    loss = model(**sequence.shard(batch), use_cache=False).loss
    loss.backward()
    mean = over_ranks(loss.detach().clone())
    return {
        "mean": mean,
        "reported": sequence.reported(loss),
        "gradients": {name: over_ranks(x) for name, x in gradients(model).items()},
    }


@pytest.mark.parametrize("kind", ["one_document", "left_padded", "packed_by_positions"])
def test_embeddings_may_stand_for_ids(pool, kind):
    documents, model = KINDS[kind](), build("llama", "eager")
    loss = learn_alone(model, documents)
    assert_learned(pool(2).run(_embedded, documents.batch), loss, gradients(model))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_holes_in_the_attention_mask_are_not_seen(pool, family):
    ids = torch.stack(draw(33, 33))
    mask = torch.ones_like(ids)
    mask[0, 7:9] = mask[1, 20:23] = mask[1, 30:] = 0
    follows = torch.nn.functional.pad(mask[:, :-1], (1, 0)) * mask  # tokens that have a seen one before them
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(follows == 0, IGNORED)}
    model = build(family, "eager")
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert_learned(pool(2).run(learn_family, family, batch), loss.detach(), gradients(model))


# What is counted


@pytest.mark.parametrize("form", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("kind", ["one_document", "masked_prompt", "left_padded"])
def test_a_given_number_of_items_divides_the_loss(pool, kind, form):
    documents, model = KINDS[kind](), build("llama", "eager")
    factor = documents.valid / 50
    loss = factor * learn_alone(model, documents)
    expected = {name: factor * x for name, x in gradients(model).items()}
    batch = documents.batch | {"num_items_in_batch": form(50)}
    assert_learned(pool(2).run(learn_family, "llama", batch), loss, expected)


# What comes out


def _dtypes(batch):
    model = build("llama", "ring")
    mine = SequenceParallel(model).shard(batch)
    return model(**mine, use_cache=False).loss.dtype, {key: x.dtype for key, x in mine.items() if key in batch}


@pytest.mark.parametrize("ranks", [1, 2])
def test_dtypes_stay_what_they_are(pool, ranks):
    batch = KINDS["one_document"]().batch
    for loss, mine in pool(ranks).run(_dtypes, batch):
        assert loss == torch.float32
        assert mine == {key: x.dtype for key, x in batch.items()}


def _returned(batch):
    sequence = SequenceParallel(build("llama", "ring"))
    before = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
    mine = sequence.shard(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(before[key])) for key in batch)
    sharding = mine["sharding"]
    tokens = {key: x for key, x in mine.items() if isinstance(x, torch.Tensor) and x.shape[1:2] == (sharding.tokens,)}
    return {key: sharding.unshard(x, 1) for key, x in tokens.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_tokens_are_together_the_batch(pool, kind, ranks):
    documents = KINDS[kind]()
    shape = documents.batch["labels"].shape
    others = {"weights": torch.rand(shape), "features": torch.rand(*shape, 3)}
    for found in pool(ranks).run(_returned, documents.batch | others):
        for key in ("input_ids", "labels"):
            assert torch.equal(found[key], documents.batch[key])
        for key, x in others.items():
            assert torch.equal(found[key], x)
        real = documents.batch.get("attention_mask", torch.ones_like(found["input_ids"])).bool()
        assert torch.equal(found["shift_labels"][real], torch.cat(documents.targets))
        assert (found["shift_labels"][~real] == IGNORED).all()
        positions = found["position_ids"].expand_as(real)[real].split([len(x) for x in documents.ids])
        assert all(torch.equal(x - x[0], torch.arange(len(x))) for x in positions)


def _logits(batch):
    model = build("llama", "ring")
    mine = SequenceParallel(model).shard(batch)
    assert "shift_labels" not in mine
    with torch.no_grad():
        return mine["sharding"].unshard(model(**mine, use_cache=False).logits, 1)


@pytest.mark.parametrize("kind", ["one_document", "packed_by_positions", "left_padded"])
def test_a_batch_without_labels_gives_logits(pool, kind):
    documents = KINDS[kind]()
    batch = {key: x for key, x in documents.batch.items() if key != "labels"}
    with torch.no_grad():
        expected = torch.cat([build("llama", "eager")(input_ids=x[None]).logits[0] for x in documents.ids])
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for found in pool(2).run(_logits, batch):
        torch.testing.assert_close(found[real], expected, rtol=0, atol=GRADIENT * expected.abs().max().item())


# Which ranks share a sequence


def _learn_in(group, batch):
    """Loss and gradients, averaged over the ranks of a group."""
    model = build("llama", "ring")
    sequence = SequenceParallel(model, group)
    loss = model(**sequence.shard(batch), use_cache=False).loss
    loss.backward()
    if group is not ONE_DEVICE:
        ranks = group.get_group() if hasattr(group, "get_group") else group
        for weight in model.parameters():
            dist.all_reduce(weight.grad, group=ranks)
            weight.grad /= ranks.size()
    return sequence.reported(loss), gradients(model)


def _in_groups(batches, form):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    group = mesh["cp"] if form == "mesh" else mesh["cp"].get_group()
    return _learn_in(group, batches[mesh.get_local_rank("dp")])


def _assert_each_learned(results, learned_from):
    for (loss, found), documents in zip(results, learned_from, strict=True):
        model = build("llama", "eager")
        assert_same_loss(loss, learn_alone(model, documents))
        assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("form", ["mesh", "group"])
def test_groups_learn_from_batches_of_their_own(pool, form):
    first, second = KINDS["packed_by_positions"](), KINDS["left_padded"]()
    results = pool(4).run(_in_groups, [first.batch, second.batch], form)
    _assert_each_learned(results, [first, first, second, second])


def _each_alone(batches):
    return _learn_in(ONE_DEVICE, batches[dist.get_rank()])


def test_one_device_in_a_job_of_several_shares_nothing(pool):
    both = [KINDS["packed_by_positions"](), KINDS["left_padded"]()]
    _assert_each_learned(pool(2).run(_each_alone, [x.batch for x in both]), both)


def _without_a_group(batch):
    assert not dist.is_initialized()
    model = build("llama", "ring")
    sequence = SequenceParallel(model)
    loss = model(**sequence.shard(batch), use_cache=False).loss
    loss.backward()
    return sequence.reported(loss), gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_without_torch_distributed_one_device_learns(kind):
    _assert_each_learned([_without_a_group(KINDS[kind]().batch)], [KINDS[kind]()])


# Evaluation


def _evaluated(batch):
    model = build("llama", "ring").eval()
    sequence = SequenceParallel(model)
    with torch.no_grad():
        return sequence.reported(model(**sequence.shard(batch), use_cache=False).loss)


def test_losses_of_an_evaluation_are_reported_alike_on_all_ranks(pool):
    documents = KINDS["masked_prompt"]()  # whose targets lie on one rank
    expected = learn_alone(build("llama", "eager"), documents)
    for found in pool(3).run(_evaluated, documents.batch):
        assert_same_loss(found, expected)


def test_all_ids_of_the_vocabulary_are_tokens(pool):
    """Padding is said by the mask alone: the padding token's number may stand in a text."""
    ids = torch.arange(VOCABULARY).roll(64)[None, 40:90]
    assert (ids == 0).any()
    _assert_learns(pool, 2, whole(list(ids)))


# What repeats from batch to batch


@given(
    length=st.integers(1, 40),
    others=st.lists(st.integers(-100, 10**6), min_size=1, max_size=40),
    at=st.integers(0, 10**6),
)
def test_fingerprints_tell_batches_apart_by_what_is_where(length, others, at):
    ids = torch.tensor((others * length)[:length])
    batch = {"input_ids": ids[None], "weights": torch.rand(1, length), "name": "a"}
    found = fingerprints(batch)
    assert found == fingerprints({**batch, "input_ids": ids[None].clone()})
    assert list(found) == sorted(batch)
    changed = ids.clone()
    changed[at % length] += 1 + at
    for other in (changed[None], ids[None].int(), ids[:, None], ids.roll(1)[None]):
        same = other.dtype == ids.dtype and other.shape == (1, length) and torch.equal(other, ids[None])
        assert (fingerprints({**batch, "input_ids": other}) == found) is same
    assert fingerprints({**batch, "weights": batch["weights"] + 1})["weights"] != found["weights"]


def test_batches_alike_have_one_sharding_and_others_their_own():
    sequence = SequenceParallel(build("llama", "ring"), ONE_DEVICE)
    ids = torch.arange(20).view(2, 10)
    lengths = ([0, 4, 20], [0, 4, 20], [0, 5, 20])
    first, same, other = (
        sequence.shard({"input_ids": ids + i, "labels": ids, "cu_seq_lens_q": torch.tensor(edges, dtype=torch.int32)})
        for i, edges in enumerate(lengths)
    )
    assert first["sharding"] is same["sharding"]
    assert other["sharding"] is not first["sharding"]
    assert not torch.equal(first["input_ids"], same["input_ids"])
    shorter = sequence.shard({"input_ids": ids[:, :-1], "labels": ids[:, :-1]})
    assert shorter["sharding"] is not first["sharding"]
