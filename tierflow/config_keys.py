"""Every configuration key that tierflow knows, and what becomes of it: the one table behind the reader and the docs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Role(enum.Enum):
    """What becomes of a key.

    HONOURED: it does what it says. COMPUTED: tierflow works the figure out itself; accepted, and listed once.
    UNUSED: it cannot change a result here; accepted, and listed once. REFUSED: ignoring it would change results,
    so only the values that switch it off are accepted.
    """

    HONOURED = "honoured"
    COMPUTED = "computed"
    UNUSED = "unused"
    REFUSED = "refused"


@dataclass(frozen=True)
class Key:
    """One key. ``expect`` completes "expected ..."; ``note`` is what an UNUSED or REFUSED key's message says."""

    path: str
    role: Role
    expect: str
    default: str = ""
    unit: str = ""
    note: str = ""
    off: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def _honoured(path: str, expect: str, default: str, unit: str = "", note: str = "") -> Key:
    return Key(path, Role.HONOURED, expect, default, unit, note)


def _many(role: Role, block: str, expect: str, names: str, note: str) -> list[Key]:
    prefix = f"{block}." if block else ""
    return [Key(prefix + name, role, expect, note=note) for name in names.split()]


def _refused(path: str, expect: str, off: tuple[Any, ...], note: str) -> Key:
    return Key(path, Role.REFUSED, expect, note=note, off=off)


#: ``expect`` of keys whose type is checked by the reader (the models check those that are honoured).
BOOL, WHOLE, NUMBER, TEXT, BLOCK, ANY = (
    "true or false",
    "a whole number of 0 or more",
    "a number",
    "a string",
    "a block {...}",
    "anything",
)

_SIZE = '"auto", or a size such as "24GB", "24GiB" or a whole number of bytes'
_TIER = '"none" (the compute device), "cpu", "nvme" or "auto"'
_POSITIVE = 'a whole number of 1 or more, or "auto"'
_ZERO, _PARAM, _OPTIM = "zero_optimization", "zero_optimization.offload_param", "zero_optimization.offload_optimizer"
_ONE_RANK = "one process trains, so nothing is communicated between ranks"
_LIVE = "what lives on the device, and for how long, follows from tierflow.device_memory and the observed order of use"
_BUFFERS = "buffers are sized from the model under tierflow.host_memory"

# A table reads better in rows than wrapped argument by argument.
# fmt: off
_BATCH = [
    _honoured("train_batch_size", _POSITIVE, "from the other two", "samples per optimizer step",
              "micro-batch x accumulation steps, checked"),
    _honoured("train_micro_batch_size_per_gpu", _POSITIVE, "from the other two", "samples"),
    _honoured("gradient_accumulation_steps", _POSITIVE, "from the other two", "micro-batches",
              "above 1, gradients accumulate in fp32 unless data_types.grad_accum_dtype says otherwise"),
]

_ARITHMETIC = [
    _honoured("gradient_clipping", 'a number of 0 or more, or "auto" (left to the training loop)', "0.0 (off)",
              "2-norm of all gradients"),
    _honoured("bf16.enabled", 'true, false or "auto" (the dtype that the model has)', "false",
              note="true casts the model to bf16 as it is placed; false leaves its dtype alone"),
    _honoured("fp16.enabled", 'true, false or "auto" (off)', "false",
              note="true casts the model to fp16 over fp32 masters and scales the loss: call optimizer.backward(loss)"),
    _honoured("fp16.loss_scale", 'a number of 0 or more, or "auto"', "0.0",
              note="0: dynamic; above: constant, and a gradient that is not finite raises"),
    _honoured("fp16.initial_scale_power", 'a whole number from 0 to 127, or "auto"', "16", "the scale starts at 2 to this"),
    _honoured("fp16.loss_scale_window", _POSITIVE, "1000", "steps without overflow", "after so many the scale doubles"),
    _honoured("fp16.hysteresis", _POSITIVE, "2", "overflows", "that many until the scale is halved"),
    _honoured("fp16.consecutive_hysteresis", BOOL, "false",
              note="true counts overflows anew after every good step, false after the scale has doubled"),
    _honoured("fp16.min_loss_scale", 'a number above 0, or "auto"', "1.0", note="an overflow there raises"),
    _honoured("fp16.auto_cast", BOOL, "false", note="true casts floating-point inputs of the model to fp16"),
    _honoured("data_types.grad_accum_dtype", '"fp32", "bf16", "fp16", null or "auto"',
              "fp32 with accumulation, else the parameter's"),
]

_OPTIMIZER = [
    _honoured("optimizer.type", '"AdamW", "Adam", "Lion" or "Adagrad"', "AdamW",
              note="as in DeepSpeed, Adam is AdamW unless adam_w_mode is false; a setting that is not the type's own is an "
              "error"),
    _honoured("optimizer.params.lr", 'a number of 0 or more, or "auto"', "0.001", note="Adagrad: 0.01"),
    _honoured("optimizer.params.betas", 'two numbers in [0, 1), or "auto"', "[0.9, 0.999]", note="not Adagrad's"),
    _honoured("optimizer.params.eps", 'a number above 0, or "auto"', "1e-08", note="Adagrad: 1e-10; not Lion's"),
    _honoured("optimizer.params.weight_decay", 'a number of 0 or more, or "auto"', "0.0",
              note="DeepSpeed's default, not torch's; with torch_adam torch's (0.01 for AdamW); Adagrad's is L2 decay"),
    _honoured("optimizer.params.adam_w_mode", BOOL, "true", note="Adam's; false, with type Adam: L2 decay in the gradient"),
    _honoured("optimizer.params.torch_adam", BOOL, "false", note="Adam's; decides the default of weight_decay only"),
    _honoured("optimizer.params.maximize", BOOL, "false", note="Adam's"),
    _refused("optimizer.params.bias_correction", BOOL, (True,),
             "Adam without bias correction is not available; leave it out"),
    _refused("optimizer.params.amsgrad", BOOL, (False,), "AMSGrad is not available; leave it out"),
    _refused("optimizer.params.max_grad_norm", NUMBER, (0,), "set gradient_clipping at the top level instead"),
    *_many(Role.UNUSED, "optimizer.params", BOOL,
           "fused foreach capturable differentiable set_grad_none fp32_optimizer_states",
           "the update runs in tierflow's own kernels, with fp32 arithmetic"),
    Key("optimizer.legacy_fusion", Role.UNUSED, BOOL, note="the update runs in tierflow's own kernels"),
]

_SCHEDULER = [
    _honoured("scheduler.type", '"WarmupLR", "WarmupDecayLR" or "WarmupCosineLR"', "none",
              note="`tierflow finetune` follows it; in your own loop use a torch.optim.lr_scheduler"),
    _honoured("scheduler.params.warmup_min_lr", 'a number of 0 or more, or "auto"', "0.0"),
    _honoured("scheduler.params.warmup_max_lr", 'a number of 0 or more, or "auto"', "optimizer.params.lr"),
    _honoured("scheduler.params.warmup_num_steps", _POSITIVE, "1000", "optimizer steps", "auto: the run's"),
    _honoured("scheduler.params.warmup_type", '"log" or "linear"', "log"),
    _honoured("scheduler.params.total_num_steps", _POSITIVE, "the run's", "optimizer steps"),
    _honoured("scheduler.params.warmup_min_ratio", 'a number from 0 to 1, or "auto"', "0.0", "of lr"),
    _honoured("scheduler.params.cos_min_ratio", 'a number from 0 to 1, or "auto"', "0.0001", "of lr"),
    _refused("scheduler.params.last_batch_iteration", NUMBER, (-1,), "resume with a checkpoint instead"),
]

_FOLDERS = 'a path, a list of different paths (striped over), or "auto"'

_PLACES = [
    _honoured(f"{_ZERO}.stage", '0, 1, 2, 3 or "auto"', "3",
              note="with one rank nothing is partitioned; offload_param needs 3 and offload_optimizer 1 or more"),
    _honoured(f"{_PARAM}.device", _TIER, "auto", note="DeepSpeed's default is none"),
    _honoured(f"{_PARAM}.nvme_path", _FOLDERS, "offload_optimizer's", "directory"),
    _honoured(f"{_OPTIM}.device", _TIER, "auto", note="not faster than offload_param.device"),
    _honoured(f"{_OPTIM}.nvme_path", _FOLDERS, "offload_param's", "directory"),
    _refused(f"{_OPTIM}.ratio", NUMBER, (1,),
             "states are split over the tiers by the room under their caps, and one processor updates them all; set "
             "tierflow.device_memory and host_memory instead"),
    *_many(Role.COMPUTED, _PARAM, WHOLE, "buffer_count buffer_size max_in_cpu", _BUFFERS),
    *_many(Role.COMPUTED, _OPTIM, WHOLE, "buffer_count buffer_size", _BUFFERS),
    *_many(Role.COMPUTED, _PARAM, BOOL, "pin_memory", "host memory is one arena, registered with the device if it can be"),
    *_many(Role.COMPUTED, _OPTIM, BOOL, "pin_memory", "host memory is one arena, registered with the device if it can be"),
    *_many(Role.COMPUTED, _OPTIM, BOOL, "pipeline_read pipeline_write pipeline fast_init super_offload convert_grad_on_cpu",
           "reads, update and writes always overlap"),
    *_many(Role.COMPUTED, _OPTIM, NUMBER, "cpuadam_cores_perc", "the update uses every core that the process may use"),
]

_ZERO_KEYS = [
    *_many(Role.COMPUTED, _ZERO, WHOLE, "sub_group_size", "the update's pieces are sized from host memory"),
    *_many(Role.COMPUTED, _ZERO, WHOLE,
           "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
           "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold "
           "stage3_partition_stream_chunk_size prefetch_bucket_size param_persistence_threshold "
           "model_persistence_threshold max_live_parameters max_reuse_distance module_granularity_threshold "
           "partition_stream_chunk_size", _LIVE),
    *_many(Role.COMPUTED, _ZERO, BLOCK, "leaf_module", _LIVE),
    *_many(Role.COMPUTED, _ZERO, BOOL, "contiguous_gradients cpu_offload_use_pin_memory",
           "each gradient goes once to its place in the host arena"),
    *_many(Role.UNUSED, _ZERO, BOOL,
           "overlap_comm reduce_scatter allgather_partitions use_multi_rank_bucket_allreduce round_robin_gradients "
           "stage3_use_all_reduce_for_fetch_params use_all_reduce_for_fetch_params stage3_allgather_sequential "
           "allgather_sequential mics_hierarchical_params_gather", _ONE_RANK),
    *_many(Role.UNUSED, _ZERO, WHOLE, "reduce_bucket_size allgather_bucket_size", _ONE_RANK),
    *_many(Role.UNUSED, _ZERO, BOOL,
           "stage3_gather_16bit_weights_on_model_save gather_16bit_weights_on_model_save "
           "stage3_gather_fp16_weights_on_model_save load_from_fp32_weights elastic_checkpoint "
           "pipeline_loading_checkpoint", "tierflow.save_weights and save_checkpoint stream what is saved from its tier"),
    *_many(Role.UNUSED, _ZERO, BOOL,
           "ignore_unused_parameters legacy_stage1 memory_efficient_linear override_module_apply "
           "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory",
           "it belongs to DeepSpeed's own machinery"),
    *[_refused(f"{_ZERO}.{name}", BOOL, (False,), "quantized communication and storage would round the weights or "
               "gradients; leave it out") for name in
      ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")],
    _refused(f"{_ZERO}.zero_hpz_partition_size", WHOLE, (0, 1), "hierarchical partitioning needs several ranks, and "
             "one process trains; leave it out"),
    _refused(f"{_ZERO}.mics_shard_size", NUMBER, (-1,), "MiCS needs several ranks, and one process trains; leave it out"),
    _refused(f"{_ZERO}.zeropp_loco_param", BLOCK, (), "LoCo changes gradients; leave it out"),
    _refused(f"{_ZERO}.zenflow", BLOCK, (), "ZenFlow updates with stale gradients; here the update overlaps exactly, "
             "so leave it out"),
    _refused(f"{_ZERO}.cpu_offload", BOOL, (False,), 'this form is no longer read; write "offload_optimizer": '
             '{"device": "cpu"}'),
    *[_refused(f"{_ZERO}.{name}", BOOL, (False,), 'this form is no longer read; write "offload_param": '
               '{"device": "cpu"}') for name in ("cpu_offload_param", "cpu_offload_params")],
]

_AIO = [
    _honoured("aio.profile", "the path of a profile that `tierflow tune` wrote", "none", "",
              '"aio": "profile.json" is short for it; keys given beside it come before its settings'),
    _honoured("aio.block_size", 'a size from 1 byte to 1GiB (rounded up to 4096), or "auto"', "2097152", "bytes"),
    _honoured("aio.queue_depth", 'a whole number from 1 to 4096, or "auto"', "16", "blocks in flight (io_uring)"),
    _honoured("aio.thread_count", 'a whole number from 1 to 1024, or "auto"', "8", "threads (engine threads only)"),
    _honoured("aio.intra_op_parallelism", 'a whole number from 1 to 1024, or "auto"', "aio.thread_count",
              "threads", "DeepSpeed's newer name for thread_count"),
    _honoured("aio.rings", 'a whole number from 1 to 64, or "auto"', "1", "io_uring instances", "they share the queue's depth"),
    *_many(Role.UNUSED, "aio", BOOL, "single_submit overlap_events",
           "requests are always submitted together and kept in flight across tensors"),
    Key("aio.use_gds", Role.UNUSED, BOOL, note="transfers between device and NVMe pass through host memory"),
    Key("aio.io_backend", Role.UNUSED, TEXT, note="tierflow.engine chooses the I/O engine"),
]

_HALF = [
    *_many(Role.UNUSED, "fp16", BOOL, "fused_mode", "the update runs in tierflow's own kernels"),
    _refused("fp16.fp16_master_weights_and_grads", BOOL, (False,), "fp16 master weights would lose bits; leave it out"),
    *_many(Role.UNUSED, "bf16", BOOL, "immediate_grad_update", "gradients accumulate as they arrive"),
    *_many(Role.UNUSED, "bf16", BOOL, "check_grad_overflow",
           "always checked: a non-finite gradient raises before anything is updated"),
    _refused("bf16.bf16_master_weights_and_grads", BOOL, (False,), "masters in bf16 lose bits; leave it out"),
    _refused("bf16.bf16_optimizer_states", BOOL, (False,), 'leave it out, and for moments in bf16 set '
             'tierflow.optimizer_state to "bf16"'),
    *[_refused(f"data_types.{name}", TEXT, (), "use bf16.enabled or fp16.enabled, or give the model the dtype you want")
      for name in ("param_dtype", "buffer_dtype")],
]


def _switches(note: str, *names: str) -> list[Key]:
    """Blocks that DeepSpeed switches with ``enabled``; refused when it is on."""
    return [_refused(name, BLOCK, ({"enabled": False},), note) for name in names]


_REST = [
    *_switches("mixed precision by apex is not available; use bf16.enabled, or torch.autocast in your loop", "amp"),
    *_switches("wrap the forward in torch.autocast in your loop instead", "torch_autocast"),
    *_switches("it changes the data that is trained on; do that in your data loader", "curriculum_learning",
               "data_efficiency"),
    *_switches("it changes the model and is not available; leave it out", "progressive_layer_drop", "quantize_training",
               "hybrid_engine", "eigenvalue"),
    *_switches("it changes the batch size with the number of ranks, and one process trains", "elasticity"),
    *_switches("expert parallelism needs several ranks, and one process trains; leave it out", "expert_parallel"),
    *[_refused(name, BLOCK, (), "it changes the model and is not available; leave it out")
      for name in ("compression_training", "sparse_attention", "weight_quantization")],
    _refused("tensor_parallel", BLOCK, ({"autotp_size": 0}, {"autotp_size": 1}, {"enabled": False}),
             "tensor parallelism needs several ranks, and one process trains; leave it out"),
    _refused("pipeline", BLOCK, ({"stages": 1}, {"stages": "auto"}),
             "pipeline parallelism needs several ranks, and one process trains; leave it out"),
    _refused("sequence_parallel_size", WHOLE, (1,), "sequence parallelism needs several ranks; leave it out"),
    _refused("compile", BLOCK, ({"deepcompile": False}, {"enabled": False}), "compiling an offloaded model is not "
             "available yet; leave it out"),
    _refused("prescale_gradients", BOOL, (False,), "gradients are averaged once, at the end; leave it out"),
    _refused("gradient_predivide_factor", NUMBER, (1,), "gradients are averaged once, at the end; leave it out"),
    _refused("gradient_allreduce_op", TEXT, ("mean", "MEAN", "Mean"), "gradients are averaged over ranks; leave it out"),
    _refused("sparse_gradients", BOOL, (False,), "sparse gradients are not available; leave it out, and build "
             "embeddings with sparse=False"),
    _refused("dataloader_drop_last", BOOL, (False,), "tierflow makes no data loader for you; set drop_last in yours"),
    _refused("checkpoint.load_universal", BOOL, (False,), "DeepSpeed's universal checkpoints are not read yet"),
    _refused("load_universal_checkpoint", BOOL, (False,), "DeepSpeed's universal checkpoints are not read yet"),
    *_many(Role.UNUSED, "checkpoint", ANY, "tag_validation use_node_local_storage parallel_write writer "
           "checkpoint_serialization decoupled", "checkpoints are written by tierflow.save_checkpoint"),
    *_many(Role.UNUSED, "", BLOCK, "nebula datastates_ckpt", "checkpoints are written by tierflow.save_checkpoint"),
    *_many(Role.UNUSED, "", BOOL, "use_node_local_storage", "checkpoints are written by tierflow.save_checkpoint"),
    *_many(Role.UNUSED, "", ANY, "steps_per_print", "tierflow prints its own progress"),
    *_many(Role.UNUSED, "", BOOL, "wall_clock_breakdown memory_breakdown dump_state", "see tierflow.report"),
    *_many(Role.UNUSED, "", BLOCK, "flops_profiler comms_logger timers autotuning", "see tierflow.report"),
    *_many(Role.UNUSED, "", BLOCK, "tensorboard wandb csv_monitor comet monitor", "log from your training loop"),
    *_many(Role.UNUSED, "", ANY, "log_level", "use Python's logging for the logger tierflow"),
    *_many(Role.UNUSED, "", BLOCK, "activation_checkpointing", "switch on the model's own gradient checkpointing"),
    *_many(Role.UNUSED, "", BOOL, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
           "the update runs in tierflow's own kernels"),
    *_many(Role.UNUSED, "", BOOL, "disable_allgather fp32_allreduce use_data_before_expert_parallelism", _ONE_RANK),
    *_many(Role.UNUSED, "", TEXT, "communication_data_type seq_parallel_comm_data_type", _ONE_RANK),
    *_many(Role.UNUSED, "", BOOL, "managed_gradient_accumulation", "a step is where your loop calls optimizer.step()"),
    *_many(Role.UNUSED, "", BOOL, "graph_harvesting", "it belongs to DeepSpeed's own machinery"),
    *_many(Role.UNUSED, "", WHOLE, "vocabulary_size", "it belongs to DeepSpeed's own machinery"),
]

_TIERFLOW = [
    _honoured("tierflow.device_memory", _SIZE, "auto", "bytes", "cap on what tierflow holds on the compute device"),
    _honoured("tierflow.host_memory", _SIZE, "auto", "bytes", "cap on what tierflow holds in host memory"),
    _honoured("tierflow.nvme_capacity", _SIZE, "auto", "bytes", "cap on the swap store"),
    _honoured("tierflow.optimizer_state", '"auto", "fp32", "lossless", "bf16", "int8" or "int8-24bit"', "auto",
              note="auto: lossless for bf16 models, fp32 for others; the last three are lossy and never chosen by auto, "
              "int8-24bit is for bf16 models (docs/kernels.md)"),
    _honoured("tierflow.device", '"auto", "cpu", "cuda" or "cuda:N"', "auto"),
    _honoured("tierflow.engine", '"auto", "io_uring" or "threads"', "auto", note="how files are read and written"),
    _honoured("tierflow.prefetch", 'true, false or "auto"', "true", note="false fetches on demand; results are the same"),
    _honoured("tierflow.update", '"auto", "immediate", "deferred" or "speculative"', "auto",
              note="when the update runs: in `optimizer.step()`, before each unit's next use, or in the last backward and "
              "undone where clipping needs it; auto: before the next use where anything waits for a drive or an accelerator, "
              "at once elsewhere; results are the same"),
    _honoured("tierflow.accumulation", '"auto", "layer_major" or "micro_batch"', "auto",
              note="the order of micro-batches in `train_batch` and `finetune`: layer_major fetches a unit once for all "
                   "of them, while their activations wait in memory; same bits where nothing draws random numbers; auto "
                   "takes it where it saves fetches that the step waits for, nothing draws, and the activations fit"),
    _honoured("tierflow.gradients", '"auto", "host" or "nvme"', "auto",
              note="where gradients wait for the update, if optimizer states live on NVMe: auto leaves as many in host memory "
                   "as have room; results are the same"),
    _honoured("tierflow.piece_elements", _POSITIVE, "auto", "elements", "of one piece of the update"),
    _honoured("tierflow.trace", 'a path or "auto" (no trace)', "none", "file",
              "Chrome trace (JSON) of optimizer steps 2 to 4, which Perfetto opens"),
    _honoured("tierflow.report", 'true, false or "auto"', "true", note="the memory table is logged (INFO) by `offload`; the config and the table are printed by `finetune`"),
]

# fmt: on

KEYS: dict[str, Key] = {
    key.path: key
    for key in [
        *_TIERFLOW,
        *_BATCH,
        *_ARITHMETIC,
        *_OPTIMIZER,
        *_SCHEDULER,
        *_PLACES,
        *_AIO,
        *_ZERO_KEYS,
        *_HALF,
        *_REST,
    ]
}

#: DeepSpeed's old names of whole blocks.
ALIASES = {"bfloat16": "bf16"}

#: Known values that are not there yet: (key, value) -> the reason and the remedy.
NOT_YET: dict[tuple[str, str], str] = {
    **{
        ("scheduler.type", name): "this schedule is not available; use one of the three warm-up schedules, or leave "
        "scheduler out and put a torch.optim.lr_scheduler on the optimizer"
        for name in ("LRRangeTest", "OneCycle")
    },
}


def blocks() -> dict[str, list[str]]:
    """Each block's dotted path ("" for the top) and the names directly in it, blocks included."""
    found: dict[str, list[str]] = {"": []}
    for path in KEYS:
        parts = path.split(".")
        for depth, name in enumerate(parts):
            names = found.setdefault(".".join(parts[:depth]), [])
            if name not in names:
                names.append(name)
    return found
