"""A PEFT adapter of Hugging Face's CogVLM on disk: names of its tensors, and patterns that name its modules.

q, k and v, which have a factor pair each in SAT, are one pair of PEFT: A stacked, B block-diagonal. With n of them the
rank is n r and alpha n times (with rsLoRA sqrt(n) times) as large, so that the product is the same to the last bit.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
LEAVES = ("lora_A.weight", "lora_B.weight")
EMBEDDING_LEAVES = ("lora_embedding_A", "lora_embedding_B")


def pattern_for(names: Iterable[str]) -> str:
    """Return a regular expression that matches exactly these names; layers differing by number are one alternative."""
    numbers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name if match is None else f"{name[: match.start()]}#{name[match.end() :]}"
        numbers[template].append(match[0] if match else "")
    templates: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for template, layer_numbers in numbers.items():
        templates[tuple(sorted(layer_numbers, key=lambda number: (len(number), number)))].append(template)
    return "|".join(
        re.escape(template).replace(r"\#", f"({'|'.join(layer_numbers)})")
        for layer_numbers, alike in templates.items()
        for template in alike
    )


def pattern_table(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return (the most common value, {pattern: value} for the names with another one), as in rank_pattern."""
    common = Counter(values.values()).most_common(1)[0][0]
    names_by_value = defaultdict(list)
    for name, value in values.items():
        if value != common:
            names_by_value[value].append(name)
    # PEFT matches the end of a name as well: hence the "^".
    return common, {f"^({pattern_for(names)})": value for value, names in names_by_value.items()}
