"""The optimizer: it holds what trains, each once; its rate is one at which LoRA learns; a step has an effect."""

from collections import Counter

import torch
from torch import nn

from sat_lora.findings.finding import Finding, looks_for
from sat_lora.training.settings.config import Schedule
from sat_lora.training.settings.resolve import LOWEST_USEFUL_RATE
from sat_lora.training.settings.schedule import schedule_problems


@looks_for("optimizer-holds")
def optimizer_findings(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Finding]:
    """Return what an optimizer lacks, holds twice or holds for nothing.

    It is looked at as it was made, before DeepSpeed puts copies in place of its parameters.
    """
    uses = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    findings = []
    for count, fault in ((0, "the optimizer does not hold it"), (2, "the optimizer holds it more than once")):
        wrong = [n for n, p in model.named_parameters() if p.requires_grad and min(uses[id(p)], 2) == count]
        if wrong:
            seen = fault + (f"; {len(wrong)} in all" if len(wrong) > 1 else "")
            findings.append(Finding(code="optimizer-holds", seen=seen, parameter=wrong[0]))
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and uses[id(p)]]
    if frozen:
        seen = f"the optimizer holds {len(frozen)} parameters that do not train, which takes memory"
        findings.append(Finding(code="optimizer-holds", seen=seen, parameter=frozen[0]))
    return findings


@looks_for("learning-rate")
def learning_rate_findings(groups: list[dict], peak: float) -> list[Finding]:
    """Return what is wrong with the rates of an optimizer.

    groups: its `param_groups` after the first step of the schedule. peak: the rate that is asked for.
    """
    findings = []
    zero = [number for number, group in enumerate(groups) if not group["lr"] > 0]
    if zero:
        seen = f"after the first step of the schedule the rate of group {zero[0]} is {groups[zero[0]]['lr']:g}"
        fix = "set --lr above zero, and --warmup to less than all steps"
        findings.append(Finding(code="learning-rate", seen=seen, option="--lr", fix=fix))
    elif peak < LOWEST_USEFUL_RATE:
        seen = f"the highest rate is {peak:g}, below {LOWEST_USEFUL_RATE:g}"
        findings.append(Finding(code="learning-rate", seen=seen, option="--lr"))
    return findings


@looks_for("schedule")
def schedule_findings(schedule: Schedule, peak: float, steps: int) -> list[Finding]:
    """Return what is wrong with the rates of all steps, as the run would set them. peak: the highest of them."""
    problems = schedule_problems(schedule, peak, steps)
    return [Finding(code="schedule", seen=problem, option=problem.split()[0]) for problem in problems]


@looks_for("step-without-effect")
def effect_findings(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[Finding]:
    """Return a finding if a step has changed nothing.

    before, after: trainable parameters by name; the step's gradients were all made of non-zero deltas.
    """
    still = [name for name in before if torch.equal(before[name], after[name])]
    if not still or len(still) < len(before):
        return []
    seen = f"none of {len(before)} trainable parameters changed in a real step"
    return [Finding(code="step-without-effect", seen=seen, parameter=still[0])]
