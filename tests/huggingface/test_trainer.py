"""RingTrainer trains, evaluates, logs, predicts and goes on from a checkpoint as the plain Trainer does on one device.

The data are right-padded or packed, prompts are masked and leave very unequal numbers of targets, and lengths divide
nothing.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from peft import LoraConfig
from safetensors.torch import load_file
from trainers import (
    IGNORED,
    LORA,
    LOSS,
    Run,
    assert_same_logs,
    assert_same_run,
    assert_same_weights,
    build,
    examples,
    launched,
    launched_for_fsdp,
    on_one_device,
    over_ranks,
    padded,
    results_of,
)
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ringflash.errors import ArgumentError
from ringflash.training.engines.zero import import_deepspeed
from ringflash.transformers import RingTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
ACCUMULATED = {"gradient_accumulation_steps": 2}
PACKED = {"packing": True, "max_length": 56}
TOKENS = {"include_num_input_tokens_seen": "non_padding"}
OF_PADDING = ("total_flos",)
"""Differs where groups pad, each to its own longest sequence."""

DIVISIBLE = {"train_dataset": examples(12), "eval_dataset": examples(8, seed=1)}
"""As many examples as all groups take at once; else accelerate gives some of them twice."""
STREAM = {"train_dataset": examples(12).to_iterable_dataset()}

RUNS = {
    "transformers": (2, Run(arguments=EVALUATED | TOKENS)),
    "transformers_accumulated": (2, Run(arguments=ACCUMULATED | TOKENS)),
    "transformers_fused_loss": (2, Run(arguments=ACCUMULATED | EVALUATED, fused=True)),
    "transformers_in_groups": (
        4,
        Run(groups=2, arguments=EVALUATED | ACCUMULATED | TOKENS, named=DIVISIBLE),
    ),
    "transformers_by_device": (2, Run(arguments=ACCUMULATED | {"average_tokens_across_devices": False})),
    "transformers_stream_in_groups": (4, Run(groups=2, arguments={"max_steps": 6}, named=STREAM)),
    "transformers_data_parallel": (2, Run(groups=2, arguments=EVALUATED, named=DIVISIBLE)),
    "transformers_lora": (2, Run(model={"lora": True}, arguments={"logging_steps": 5})),
    "transformers_four_ranks": (4, Run(batch=1, named={"train_dataset": examples(9, shortest=8)})),
    "trl": (2, Run("trl", arguments=EVALUATED | ACCUMULATED)),
    "trl_in_groups": (4, Run("trl", groups=2, arguments=EVALUATED, named=DIVISIBLE)),
    "trl_packed": (2, Run("trl", arguments=EVALUATED | PACKED)),
    "trl_packed_accumulated": (2, Run("trl", arguments=ACCUMULATED | PACKED)),
    "trl_packed_in_groups": (4, Run("trl", groups=2, batch=1, arguments=PACKED, named=DIVISIBLE)),
    "trl_lora": (2, Run("trl", arguments={"loss_type": "dft"}, named={"peft_config": LoraConfig(**LORA)})),
}


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_evaluate_and_log_as_one_device_does(pool, tmp_path, name):
    ranks, run = RUNS[name]
    expected = on_one_device(run)
    losses = [entry["loss"] for entry in expected["logs"] if "loss" in entry]
    assert max(losses) > 1.01 * min(losses)  # something was learned
    assert_same_run(over_ranks(pool, ranks, run, tmp_path), expected, OF_PADDING if run.groups > 1 else ())


# Trainer's other engines. On CPUs accelerate takes them from a state that was made before, and from no other.

CONFIGURED = {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def _fsdp2(layer):
    return CONFIGURED | {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]},
    }


def _results_with_fsdp2(run, folder):
    with launched_for_fsdp():
        return results_of(run.make(folder, True))


@pytest.mark.parametrize(
    "run",
    [
        Run(arguments=ACCUMULATED | EVALUATED),
        Run("trl", arguments=PACKED | ACCUMULATED, model={"family": "mistral", "sliding_window": 6}),
    ],
    ids=["transformers", "trl_packed_with_windows"],
)
def test_ranks_train_under_fsdp2_with_a_cp_dimension_as_one_device_does(pool, tmp_path, run):
    """accelerate refuses windows in a cp dimension, TRL refuses packing; nothing else says how many ranks share."""
    layer = "MistralDecoderLayer" if run.model else "LlamaDecoderLayer"
    arguments = run.arguments | _fsdp2(layer) | {"parallelism_config": ParallelismConfig(cp_size=2)}
    results = pool(2).run(_results_with_fsdp2, replace(run, arguments=arguments), str(tmp_path), timeout=200)
    assert_same_run(results, on_one_device(run))


def _results_with_deepspeed(run, folder):
    import_deepspeed(torch.device("cpu"))
    with launched():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        trainer = run.make(folder, True)
        results = results_of(trainer)
        trainer.save_model(folder)
        unset_hf_deepspeed_config()
    return results["logs"]


def test_ranks_train_under_zero_3_as_one_device_does_and_save_the_whole_model(pool, tmp_path):
    plain = Run(arguments=ACCUMULATED)
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    deepspeed = {"zero_optimization": zero, "gradient_clipping": "auto"} | dict.fromkeys(batches, "auto")
    run = Run(arguments=ACCUMULATED | CONFIGURED | {"deepspeed": deepspeed})
    logs, _ = pool(2).run(_results_with_deepspeed, run, str(tmp_path), timeout=300)
    expected = on_one_device(plain)
    assert_same_logs(logs, expected["logs"], without=("total_flos",))  # of weights that are not there
    assert_same_weights(load_file(tmp_path / "model.safetensors"), expected["weights"])


# Which ranks share a sequence


def _sizes(folder, given):
    """How many ranks share a sequence, and which."""
    found = []
    for sequence_size, cp_size, launch in given:
        with launched_for_fsdp():
            ranks = dist.get_world_size() // (cp_size or launch or 1)
            config = None if cp_size is None else ParallelismConfig(cp_size=cp_size, dp_shard_size=ranks)
            if launch is not None:  # as `accelerate launch` hands its options on
                os.environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": str(launch)}
                os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(ranks)
            run = Run(arguments=_fsdp2("LlamaDecoderLayer") | {"parallelism_config": config})
            try:
                trainer = run.make(folder, True, sequence_size=sequence_size)
                assert trainer.args.parallelism_config is config
                assert trainer.get_total_train_batch_size(trainer.args) == 8 // trainer.get_cp_size()
                found.append((trainer.get_cp_size(), dist.get_process_group_ranks(trainer.sequence.group)))
            except ArgumentError as error:
                found.append(str(error))
    return found


def test_size_comes_from_the_argument_the_configuration_or_accelerate_launch(pool, tmp_path):
    given = [(2, None, None), (None, 2, None), (None, None, 2), (2, 2, None), (None, None, None), (4, 2, None)]
    results = pool(4).run(_sizes, str(tmp_path), [*given, (3, None, None), (0, None, None)])
    for rank, (argument, config, launch, both, nothing, *refused) in enumerate(results):
        assert argument == config == launch == both == (2, [rank // 2 * 2, rank // 2 * 2 + 1])
        assert nothing == (4, [0, 1, 2, 3])
        assert refused == [
            "sequence_size=4, and ParallelismConfig has cp_size=2; allowed is one of them",
            "sequence_size=3 on 4 ranks; allowed are [1, 2, 4]",
            "sequence_size=0 on 4 ranks; allowed are [1, 2, 4]",
        ]


def test_one_process_trains_as_the_plain_trainer_does(tmp_path):
    run = Run("trl", arguments=EVALUATED | PACKED)
    with launched():
        results = results_of(run.make(str(tmp_path), True))
    assert_same_run([results], on_one_device(run))


# Counting


def _flattened(rows, masked):
    """Documents laid end to end; the first label of each is no target, but only in `masked` batches it says so."""
    ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    labels = ids.clone()
    if masked:
        labels[positions == 0] = IGNORED
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None]}


def masked_starts(rows):
    return _flattened(rows, True)


def unmasked_starts(rows):
    return _flattened(rows, False)


def test_labels_at_the_start_of_documents_are_neither_targets_nor_counted(pool, tmp_path):
    expected = on_one_device(Run(arguments=ACCUMULATED, named={"data_collator": masked_starts}))
    run = Run(arguments=ACCUMULATED, named={"data_collator": unmasked_starts})
    assert_same_run(over_ranks(pool, 2, run, tmp_path), expected)


def test_a_model_may_be_named_by_its_folder(pool, tmp_path):
    build("eager").save_pretrained(tmp_path / "model")
    run = Run("trl", arguments={"model_init_kwargs": {"attn_implementation": "ring"}})
    results = over_ranks(pool, 2, run, tmp_path, model=str(tmp_path / "model"))
    assert_same_run(results, on_one_device(Run("trl")))


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
OF_LONGEST = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
"""Frequencies depend on the longest sequence, of which only a prepared model is told."""


def ring_model():
    """What a run may begin with."""
    return build("ring", **OF_LONGEST)


def test_models_made_anew_for_a_run_are_prepared(pool, tmp_path):
    results = over_ranks(pool, 2, Run(named={"model_init": ring_model}), tmp_path)
    assert_same_run(results, on_one_device(Run(model=OF_LONGEST)))


# Going on from a checkpoint


def test_a_checkpoint_within_an_epoch_goes_on_along_the_same_curve(pool, tmp_path):
    """Also on one device: what is saved says nothing of ranks but their random states."""
    saved = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 5}
    run = Run(arguments=saved)  # of 6 steps an epoch
    whole = over_ranks(pool, 2, run, tmp_path)
    expected = on_one_device(run)
    assert_same_run(whole, expected)
    resumed = over_ranks(pool, 2, run, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert_same_logs(resumed[0]["logs"][:-1], expected["logs"][:-1])
    for result in resumed:
        assert_same_weights(result["weights"], expected["weights"])


# Predictions


def whole_predictions(prediction):
    """A metric that needs every logit of every sequence."""
    logits, labels = prediction.predictions, prediction.label_ids
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return {"right": float(right[labels[:, 1:] != IGNORED].mean()), "examples": len(logits)}


class Generating(Trainer):
    """Generates while it evaluates."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            made = self.model.generate(
                inputs["input_ids"][:1, :3], attention_mask=torch.ones(1, 3), max_new_tokens=4, do_sample=False
            )
        self.made = [*getattr(self, "made", []), made]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class RingGenerating(RingTrainer, Generating):
    """The same on several ranks."""


def _evaluated(run, folder, ring, kind=None, **named):
    """Metrics; logits of tokens that are no padding, from batches with and without labels; labels; generated texts."""
    with launched():
        trainer = run.make(folder, ring, kind, **named)
        metrics = {name: x for name, x in trainer.evaluate().items() if not name.endswith(("time", "second"))}
        data = trainer.eval_dataset
        found = trainer.predict(data)
        logits = [found.predictions]
        if run.trainer == "transformers":
            trainer.data_collator = without_labels
            logits += [trainer.predict(data.remove_columns("labels")).predictions]
        logits = [torch.tensor(x[number, : len(ids)]) for x in logits for number, ids in enumerate(data["input_ids"])]
        return metrics, torch.cat(logits), found.label_ids, getattr(trainer, "made", None)


def without_labels(rows):
    """A batch to predict from."""
    batch = padded([row | {"labels": row["input_ids"]} for row in rows])
    del batch["labels"]
    return batch


@pytest.mark.parametrize(
    ("ranks", "run"),
    [(2, Run()), (4, Run(groups=2)), (2, Run("trl"))],
    ids=["transformers", "transformers_in_groups", "trl"],
)
def test_predictions_and_metrics_are_those_of_whole_sequences(pool, tmp_path, ranks, run):
    run = replace(run, named={"compute_metrics": whole_predictions, "eval_dataset": examples(4, seed=1)})
    metrics, logits, labels, _ = _evaluated(run, str(tmp_path), False)
    for found, *others in pool(ranks).run(_evaluated, run, str(tmp_path), True, sequence_size=2, timeout=200):
        assert found == pytest.approx(metrics, rel=LOSS)
        assert found["eval_examples"] == 4
        torch.testing.assert_close(others[0], logits, rtol=0, atol=LOSS * logits.abs().max().item())
        assert (others[1] == labels).all()


def test_a_trainer_that_generates_while_it_evaluates_does_so_on_each_rank_alone(pool, tmp_path):
    metrics, *_, made = _evaluated(Run(), str(tmp_path), False, Generating)
    for found, *_, texts in pool(2).run(_evaluated, Run(), str(tmp_path), True, RingGenerating):
        assert found == pytest.approx(metrics, rel=LOSS)
        assert len(texts) == len(made)
        assert all(torch.equal(x, y) for x, y in zip(texts, made, strict=True))


# Workers


def _drawn_by_workers(folder):
    """What the first worker of a loader draws before its first sample."""
    with launched():
        trainer = Run(arguments={"dataloader_num_workers": 1}).make(folder, True, sequence_size=2)
        loader = trainer.get_train_dataloader()
    with torch.random.fork_rng():
        torch.manual_seed(5)  # workers begin with the same seed and their number
        loader.worker_init_fn(0)
        return torch.rand(3)


def test_workers_of_a_group_draw_alike_and_those_of_another_do_not(pool, tmp_path):
    first, second, third, fourth = pool(4).run(_drawn_by_workers, str(tmp_path))
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


# Refusals


class OwnLoss(Trainer):
    """Takes the mean over the tokens that it is given."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


class RingOwnLoss(RingTrainer, OwnLoss):
    """Would shard what OwnLoss calls."""


def own_loss(outputs, labels, num_items_in_batch=None):
    """A loss of logits and labels, which it shifts."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class RingWithTensorParallelism(RingTrainer):
    """On a model whose layers lie on two ranks."""

    def get_tp_size(self):
        return 2


class RingWithUlysses(RingTrainer):
    """With DeepSpeed's sequence parallelism in the ParallelismConfig."""

    def get_sp_size(self):
        return 2


class RingWithDeepSpeedsGroups(RingTrainer):
    """With DeepSpeed's sequence parallelism in its JSON."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.args.hf_deepspeed_config = SimpleNamespace(config={"sequence_parallel_size": 2})


SHARED = "sequence_size=2"
MIXTRAL = {"family": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = {
    "label_smoothing": (
        Run(arguments={"label_smoothing_factor": 0.1}),
        None,
        f"label_smoothing_factor=0.1 with {SHARED}",
    ),
    "own_loss": (Run(named={"compute_loss_func": own_loss}), None, f"with {SHARED}; allowed is None: it would get one"),
    "neftune": (Run(arguments={"neftune_noise_alpha": 5.0}), None, f"neftune_noise_alpha=5.0 with {SHARED}"),
    "rebalanced": (
        Run(arguments={"train_sampling_strategy": "batch_rebalance"}),
        None,
        f"train_sampling_strategy='batch_rebalance' with {SHARED}",
    ),
    "dispatched": (
        Run(arguments={"accelerator_config": {"dispatch_batches": True}}),
        None,
        "dispatch_batches=True: rank 0 reads batches",
    ),
    "liger": (Run(arguments={"use_liger_kernel": True}), None, f"liger_kernel_config=None with {SHARED}"),
    "experts": (Run("trl", model=MIXTRAL), None, f"router_aux_loss_coef=None with {SHARED}; allowed is 0.0"),
    "tensor_parallelism": (Run(), RingWithTensorParallelism, f"tp_size=2 with {SHARED}; allowed is 1"),
    "ulysses": (Run(), RingWithUlysses, f"sp_size=2 with {SHARED}; allowed is 1"),
    "deepspeed": (Run(), RingWithDeepSpeedsGroups, f"sequence_parallel_size=2 with {SHARED}; allowed is 1"),
    "own_compute_loss": (Run(), RingOwnLoss, "OwnLoss computes its loss itself, of whole sequences"),
    "attention": (Run(named={"model": "eager"}), None, "LlamaForCausalLM has attn_implementation='eager'"),
}


def _refused(folder):
    """What each is refused with."""
    said = {}
    for name, (run, kind, _) in REFUSED.items():
        with launched():
            if "model" in run.named:
                run = replace(run, named={"model": build(run.named["model"])})
            try:
                run.make(folder, True, kind)
                said[name] = None
            except ArgumentError as error:
                said[name] = str(error)
    return said


def test_what_would_be_silently_wrong_is_refused_by_name(pool, tmp_path):
    for said in pool(2).run(_refused, str(tmp_path)):
        for name, (_, _, expected) in REFUSED.items():
            assert said[name] is not None, name
            assert expected in said[name]


def _with_short_sequences(folder):
    with launched():
        trainer = Run(batch=1, named={"train_dataset": examples(1, shortest=3).select([0])}).make(folder, True)
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {name: x[:3] for name, x in row.items()})
        with pytest.raises(ArgumentError, match=r"3 tokens leaves rank \d of 4 without any.*pad_to_multiple_of=8"):
            trainer.train()


def test_a_sequence_that_leaves_a_rank_without_tokens_is_refused_on_every_rank(pool, tmp_path):
    pool(4).run(_with_short_sequences, str(tmp_path))


def _plain_trainer(folder):
    with launched():
        trainer = Run().make(folder, True, Trainer)
        trainer.train()


def test_the_plain_trainer_is_told_that_its_batches_are_not_sharded(pool, tmp_path):
    with pytest.raises(ArgumentError, match="has a batch that was not sharded"):
        pool(2).run(_plain_trainer, str(tmp_path))
