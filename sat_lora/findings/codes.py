"""Every code that the doctor gives, with what it means. docs/doctor.md has an entry for each."""

from dataclasses import dataclass

ERROR = "error"
WARNING = "warning"
NOTE = "note"
LEVELS = (ERROR, WARNING, NOTE)
"""All levels, the worst first."""


@dataclass(frozen=True)
class Code:
    """What a code of a finding means: its level, why it matters and what helps."""

    level: str
    why: str
    """Why it matters."""
    fix: str
    """What to do."""


CODES = {
    # What trains
    "trainable-set": Code(
        ERROR,
        "what trains is not what the config says: memory and time go into the wrong parameters, or none learn",
        "call freeze_base(model) after everything else has touched requires_grad",
    ),
    "tower-not-adapted": Code(
        WARNING,
        "a part of the model that was asked for gets no adapter and will not learn",
        "look at exclude_modules, layers_to_transform and qkv_slots, which come after target_modules",
    ),
    "dtype-or-device": Code(
        ERROR,
        "an adapter on another device, or of another precision than the config says, fails or trains differently",
        "move the model as a whole, after add_lora",
    ),
    "quantized-parameter": Code(
        ERROR,
        "DeepSpeed casts, broadcasts and partitions parameters, which a weight in few bits does not bear",
        "quantise with --quantize or quantize_model(model), which hold the weight as a buffer; after loading a state, "
        "never assign it with load_state_dict(..., assign=True)",
    ),
    "fresh-adapter": Code(
        ERROR,
        "a fresh adapter has to change nothing: training would begin from another model than the base",
        "call mixin.reinit() after loading the base",
    ),
    "trainable-differs": Code(
        ERROR,
        "ranks that train different parameters wait for each other's gradients for ever, or sum the wrong ones",
        "build the model from the same config on every rank; never decide by rank, data or files of one machine",
    ),
    "parameter-order": Code(
        ERROR,
        "ZeRO lays parameters out in this order on every rank: sums and optimizer state would go to the wrong ones",
        "add modules and parameter groups in one order; sort what comes out of a set or a folder",
    ),
    # Gradients
    "gradient-missing": Code(
        ERROR,
        "a rank whose batch skips a part of the model never sends its gradient; the others wait for it in backward",
        "use the models of sat_lora.cogvlm, which run every part on every batch, or add_lora(..., fixed_order=True)",
    ),
    "gradient-order": Code(
        ERROR,
        "ZeRO fills its buckets as gradients arrive: in another order ranks reduce different buckets, and hang or err",
        "use the models of sat_lora.cogvlm, or add_lora(..., fixed_order=True) with ZeRO 1 or 2",
    ),
    "gradient-twice": Code(
        ERROR,
        "ZeRO 1 and 2 reduce a parameter when its gradient arrives; one that arrives twice is reduced half-done",
        "use a shared layer outside of checkpointed regions only, or give each use its own adapter",
    ),
    "unreachable": Code(
        ERROR,
        "no path leads from the loss back to this adapter, so it never learns",
        "remove the detach(), the no_grad() or the conversion that the path ends at",
    ),
    # Checkpointing
    "checkpoint-without-grad": Code(
        ERROR,
        "reentrant checkpointing computes no gradients behind an input that asks for none: the layer never trains",
        "call requires_grad_() on the region's input, or train() on the model: SAT does it in training mode",
    ),
    "recompute-differs": Code(
        ERROR,
        "gradients are computed from another forward pass than the loss was",
        "make the layer a pure function of its input and torch's random state",
    ),
    "switched-between-passes": Code(
        ERROR,
        "layers that are recomputed in backward run as they are then: hooks and switches have to stay as in forward",
        "enable, disable, merge or add adapters between steps, never between forward and backward",
    ),
    # Model parallelism
    "replicas-differ": Code(
        ERROR,
        "parameters that every model-parallel rank holds whole have to be equal; they have drifted apart",
        "seed them alike, sum their gradients over the model-parallel ranks, or load one file on all ranks",
    ),
    "sharding-flag": Code(
        ERROR,
        "DeepSpeed's gradient norm and SAT's broadcast read this flag: clipping or initial values become wrong",
        "set model_parallel = tensor_model_parallel = True on what is cut, and neither on what is whole",
    ),
    "parallel-rule": Code(
        ERROR,
        "at this model-parallel size the layer with its delta does not compute what it does in one process",
        "use sat_lora's LoraMixin (sat_lora.interop.sat_lora2 takes SAT's arguments)",
    ),
    # Configuration
    "options": Code(ERROR, "the run would refuse to start", "change the option as the message says"),
    "unknown-key": Code(
        ERROR,
        "DeepSpeed ignores keys that it does not know at the top level, and the run goes without the setting",
        "correct or remove it",
    ),
    "misplaced-key": Code(
        ERROR,
        "DeepSpeed reads this key in another section; where it is, it does nothing",
        "move it to the section that is named",
    ),
    "batch-arithmetic": Code(
        WARNING,
        "the file's batch sizes do not fit each other; the run takes one of them",
        "leave train_batch_size out of the file",
    ),
    "precision": Code(
        WARNING,
        "values are converted at loading: float16 overflows where bfloat16 does not, float32 takes twice the memory",
        "train in the checkpoint's own precision where the device has it",
    ),
    "bucket-size": Code(
        WARNING,
        "ZeRO allocates its buckets whole, whatever there is to reduce",
        'set "reduce_bucket_size" to no more than the elements that train',
    ),
    "optimizer-holds": Code(
        ERROR,
        "a parameter that the optimizer lacks never learns; one that it holds twice takes two steps at once",
        "make the optimizer from parameter_groups(model)",
    ),
    "learning-rate": Code(
        WARNING,
        "LoRA learns next to nothing at such a rate: full fine-tuning's are ten to a hundred times too low for it",
        "try --lr 1e-4",
    ),
    "schedule": Code(
        WARNING,
        "steps at a rate that is nothing beside the highest one, or on the way up to it, teach next to nothing",
        "look at --warmup, --lr-decay-style and --min-lr-ratio beside the number of steps",
    ),
    "step-without-effect": Code(
        ERROR,
        "after a real step the adapter is what it was: the run would end with an adapter that changes nothing",
        "see the other findings; without any, look at the learning rate and the gradients",
    ),
    # Data
    "loader-failed": Code(
        ERROR,
        "an exception in a loader ends its rank, and the others wait for it",
        "look at the line that is named; a sample that cannot be used is a BrokenSample, not an exception",
    ),
    "wrong-labels": Code(
        ERROR,
        "the model would learn to say something else than the next tokens of its own sample",
        "give each token its own id as label, -100 on prompt, image and padding; the loss shifts them by one",
    ),
    "token-ids": Code(
        ERROR,
        "the base has no embedding for such a token: the forward pass ends with an index out of range",
        "give the base's own tokenizer with --local_tokenizer",
    ),
    "image-size": Code(
        ERROR,
        "the vision tower has position embeddings for one size of image alone",
        "resize images to eva_args.image_size of the base's model_config.json",
    ),
    "repeated-samples": Code(
        WARNING,
        "what comes twice in an epoch takes the place of other samples, which never come",
        "look at the sampler and the dataset; or the data itself holds samples several times",
    ),
    "shared-samples": Code(
        WARNING,
        "data-parallel ranks that read the same samples add nothing to each other: the batch is smaller than it seems",
        "give the sampler this rank's data-parallel rank and size; or the data itself holds samples several times",
    ),
    "no-labels": Code(
        ERROR,
        "every label is -100, so there is nothing to learn from the sample",
        "raise --max_length so that the answer fits behind image and prompt, and look for empty answers",
    ),
    "too-long": Code(
        WARNING,
        "what lies beyond --max_length is cut off, of the answer first",
        "raise --max_length to the length that is named",
    ),
    "image-tokens": Code(
        ERROR,
        "an image takes image_length + 2 places in the text; with another number the model refuses, or mixes images up",
        "take image_length and the image size from the base's model_config.json",
    ),
    "unequal-batches": Code(
        ERROR,
        "a rank that runs out of batches leaves the others waiting in the next collective",
        "give every rank the same number of batches (an empty one is padded), or drop the last ones",
    ),
    "broken-files": Code(
        WARNING,
        "broken samples are left out; too many of them end the run",
        "mend or remove them, or raise --max-broken-share",
    ),
    # Values
    "not-finite": Code(
        ERROR,
        "a NaN or infinity makes every adapter NaN in the next step, on all ranks",
        "look at the batch and the weights there; with fp16 use bf16 instead; lower --lr if it comes after many steps",
    ),
    # Machine
    "memory": Code(
        ERROR,
        "the step does not fit into the device's memory",
        "in this order: --checkpoint-activations --vit_checkpoint_activations, a smaller --batch-size with "
        "--gradient-accumulation-steps, --quantize nf4, --zero-stage 3, --model-parallel-size; "
        "sat-lora estimate --fit GB finds what fits",
    ),
    "versions": Code(
        WARNING,
        "this combination of versions is not the one that sat_lora is tested with",
        "pip install -c constraints.txt",
    ),
    "missing-module": Code(
        ERROR,
        "a package that a run imports cannot be imported",
        "install what the last line of its error names",
    ),
    "shared-memory": Code(
        WARNING,
        "data workers and NCCL pass tensors through /dev/shm; when it is full they die of a bus error",
        "start the container with --shm-size 8g, or use --num-workers 0",
    ),
    "disk-space": Code(
        ERROR,
        "the run could not save what it has learned",
        "free space under --save, or keep fewer adapters with --keep",
    ),
    "collective": Code(
        ERROR,
        "a group of ranks cannot talk to each other, or does so very slowly",
        "check network, firewall and NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells what NCCL uses",
    ),
    # During a run, and after one that hangs
    "stuck-in-data": Code(
        ERROR,
        "one rank waits for its next batch and all others wait for that rank",
        "look at the stack: a slow or dead disk, a lock, a data worker that never answers; try --num-workers 0",
    ),
    "stuck-in-code": Code(
        ERROR,
        "one rank does not come out of a piece of code and all others wait for that rank",
        "look at the line that its stack names",
    ),
    "collectives-differ": Code(
        ERROR,
        "ranks made different collectives, so each waits for a partner that never comes",
        "every rank has to make the same calls in the same order: look at the two places that are named",
    ),
    "gradients-differ": Code(
        ERROR,
        "a gradient that the others have never arrived on this rank; ZeRO waits for it",
        "as for gradient-missing: the graph must not depend on the batch; start with --doctor",
    ),
    "rank-gone": Code(
        ERROR,
        "the process of a rank has ended without a word and the others wait for it",
        "look into the system's log for the out-of-memory killer, and at the machine; then --resume",
    ),
    "rank-failed": Code(
        ERROR,
        "an exception ended one rank, and the others wait for it or were ended by the launcher",
        "mend what the exception says; then --resume",
    ),
    "hang": Code(
        ERROR,
        "no rank goes on, and what they have left behind does not say who began",
        "look at the stacks; run the step again with sat-lora doctor --run RUN --replay",
    ),
}
