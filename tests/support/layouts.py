"""The same samples written in every layout that is read."""

import base64
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.tar_shards import png, write_shard

Turns = list[tuple[str, str]]
SINGLE: list[tuple[str, Turns]] = [
    ("a", [("What is it?", "a cat")]),
    ("b", [('Say "two, three"; then stop', "two, three")]),
    ("c", [("Read it", "  7Kq2 ")]),
]
"""(name of the image, turns) of conversations of one turn."""
SEVERAL: list[tuple[str, Turns]] = [
    ("a", [("How many?", "4"), ("The first?", "7"), ("Backwards?", "2qK7")]),
    ("b", [("What is it?", "a dog")]),
]
"""The same of conversations of several turns."""
Samples = Sequence[tuple[str, Turns]]


def pictures(samples: Samples) -> dict[str, bytes]:
    """The content of the image of each name."""
    return {name: png((9, 90, 30 * number)) for number, (name, _) in enumerate(samples)}


def write_pictures(folder: Path, samples: Samples) -> None:
    for name, content in pictures(samples).items():
        (folder / f"{name}.png").write_bytes(content)


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def ours(name: str, turns: Turns, image) -> dict:
    record = {"image": image, "prompt": turns[-1][0], "answer": turns[-1][1]}
    return {**record, "history": turns[:-1]} if turns[1:] else record


def roles(turns: Turns, image=None) -> list[dict]:
    """Messages; image: what stands among the parts of the first."""
    listed = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    if image is not None:
        listed[0]["content"] = [image, {"type": "text", "text": listed[0]["content"]}]
    return listed


def llava(name: str, turns: Turns) -> dict:
    listed = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    listed[0]["value"] = "<image>\n" + listed[0]["value"]
    return {"id": name, "image": f"{name}.png", "conversations": listed}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def write_jsonl(folder: Path, samples: Samples) -> Path:
    return lines(folder / "d.jsonl", [ours(name, turns, f"{name}.png") for name, turns in samples])


def write_array(folder: Path, samples: Samples) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps([ours(name, turns, f"{name}.png") for name, turns in samples], indent=1))
    return path


def write_usual_names(folder: Path, samples: Samples) -> Path:
    records = [ours(name, turns, f"{name}.png") for name, turns in samples]
    others = {"image": "img", "prompt": "question", "answer": "response"}
    return lines(folder / "d.jsonl", [{others.get(key, key): value for key, value in r.items()} for r in records])


def write_base64(folder: Path, samples: Samples) -> Path:
    return lines(folder / "d.jsonl", [ours(n, turns, encoded(pictures(samples)[n])) for n, turns in samples])


def write_data_urls(folder: Path, samples: Samples) -> Path:
    urls = {name: f"data:image/png;base64,{encoded(content)}" for name, content in pictures(samples).items()}
    parts = {name: {"type": "image_url", "image_url": {"url": url}} for name, url in urls.items()}
    return lines(folder / "d.jsonl", [{"messages": roles(turns, parts[name])} for name, turns in samples])


def write_messages(folder: Path, samples: Samples) -> Path:
    records = []
    for name, turns in samples:
        messages = roles(turns)
        messages[0]["content"] = "<image>" + messages[0]["content"]
        records.append({"messages": messages, "images": [f"{name}.png"]})
    return lines(folder / "d.jsonl", records)


def write_llava(folder: Path, samples: Samples) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps([llava(name, turns) for name, turns in samples]))
    return path


def write_pairs(folder: Path, samples: Samples) -> Path:
    records = []
    for name, turns in samples:
        pairs = [{"human": query, "assistant": answer} for query, answer in turns]
        pairs[0]["human"] = f"<image>\n{pairs[0]['human']}"
        records.append({"image": f"{name}.png", "conversation": pairs})
    return lines(folder / "d.jsonl", records)


def write_sft(folder: Path, samples: Samples) -> Path:
    for part in ("images", "labels_en"):
        (folder / "sft" / part).mkdir(parents=True)
    for name, turns in samples:
        (folder / "sft" / "images" / f"{name}.png").write_bytes(pictures(samples)[name])
        (folder / "sft" / "labels_en" / f"{name}.json").write_text(json.dumps({"conversations": roles(turns)}))
    return folder / "sft"


def write_csv(
    folder: Path, samples: Samples, name: str = "d.csv", delimiter: str = ",", encoding: str = "utf-8"
) -> Path:
    path = folder / name
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "image", "question", "answer"])
        writer.writerows([number, f"{n}.png", *turns[0]] for number, (n, turns) in enumerate(samples))
    return path


def write_tsv(folder: Path, samples: Samples) -> Path:
    return write_csv(folder, samples, "d.tsv", "\t")


def write_excel(folder: Path, samples: Samples) -> Path:
    return write_csv(folder, samples, delimiter=";", encoding="utf-16")


def write_parquet(folder: Path, rows: list[dict], group: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet", row_group_size=group)
    return folder / "d.parquet"


def write_parquet_paths(folder: Path, samples: Samples) -> Path:
    return write_parquet(folder, [{"file_name": f"{n}.png", "prompt": t[0][0], "text": t[0][1]} for n, t in samples])


def write_parquet_bytes(folder: Path, samples: Samples) -> Path:
    images = {name: {"bytes": content, "path": "x.png"} for name, content in pictures(samples).items()}
    rows = [{"image": images[n], "query": t[-1][0], "label": t[-1][1], "history": t[:-1]} for n, t in samples]
    return write_parquet(folder, rows)


def write_parquet_messages(folder: Path, samples: Samples) -> Path:
    rows = []
    for name, turns in samples:
        parts = [[{"type": "text", "text": m["content"]}] for m in roles(turns)]
        parts[0].insert(0, {"type": "image", "text": None})
        messages = [{**m, "content": part} for m, part in zip(roles(turns), parts)]
        rows.append({"images": [{"bytes": pictures(samples)[name], "path": None}], "messages": messages})
    return write_parquet(folder, rows)


def write_tar(folder: Path, samples: Samples) -> Path:
    members = []
    for number, (name, turns) in enumerate(samples):
        record = ours(name, turns, None) if number else {"conversations": roles(turns)}
        record.pop("image", None)
        members += [(f"{name}.png", pictures(samples)[name]), (f"{name}.json", json.dumps(record))]
    return write_shard(folder / "d.tar", *members)


def write_alpaca(folder: Path, samples: Samples) -> Path:
    records = [{"instruction": t[0][0], "input": "", "output": t[0][1], "image": f"{n}.png"} for n, t in samples]
    return lines(folder / "d.jsonl", records)


def write_columns(folder: Path, samples: Samples) -> Path:
    """Keys that nobody knows: `COLUMNS` says which are meant."""
    return lines(folder / "d.jsonl", [{"p": f"{n}.png", "x": t[0][0], "y": t[0][1]} for n, t in samples])


def write_utf16(folder: Path, samples: Samples) -> Path:
    path = write_jsonl(folder, samples)
    path.write_text(path.read_text().replace("\n", "\r\n"), encoding="utf-16", newline="")
    return path


def write_role_lists(folder: Path, samples: Samples) -> Path:
    records = []
    for name, turns in samples:
        listed = [[who, text] for turn in turns for who, text in zip(("user", "assistant"), turn)]
        listed[0][1] = f"<image>{listed[0][1]}"
        records.append({"image": f"{name}.png", "conversation": listed})
    return lines(folder / "d.jsonl", records)


def write_turns_with_images(folder: Path, samples: Samples) -> Path:
    """The image named by the turn that it stands in, as in GLM-4V's data."""
    return lines(
        folder / "d.jsonl",
        [
            {"messages": [{**turn, "image": f"{name}.png"} if not place else turn for place, turn in enumerate(listed)]}
            for name, turns in samples
            for listed in [roles(turns)]
        ],
    )


def write_tags(folder: Path, samples: Samples) -> Path:
    """The image named by a text, as in Qwen-VL's data."""
    records = []
    for name, turns in samples:
        listed = llava(name, turns)["conversations"]
        listed[0]["value"] = f"Picture 1: <img>{name}.png</img>\n{turns[0][0]}"
        records.append({"conversations": listed})
    return lines(folder / "d.jsonl", records)


def write_sft_zh(folder: Path, samples: Samples) -> Path:
    (write_sft(folder, samples) / "labels_en").rename(folder / "sft" / "labels_zh")
    return folder / "sft" / "labels_zh"


COLUMNS = ("image=p", "prompt=x,answer=y")
SINGLE_ONLY: dict[str, Callable[[Path, Samples], Path]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "csv of Excel": write_excel,
    "parquet, paths": write_parquet_paths,
    "Alpaca": write_alpaca,
    "columns": write_columns,
}
"""Layouts that have no place for several turns."""
LAYOUTS: dict[str, Callable[[Path, Samples], Path]] = {
    "jsonl": write_jsonl,
    "json array": write_array,
    "UTF-16": write_utf16,
    "usual names": write_usual_names,
    "base64": write_base64,
    "data URLs": write_data_urls,
    "messages": write_messages,
    "LLaVA": write_llava,
    "pairs": write_pairs,
    "role and text": write_role_lists,
    "an image in a turn": write_turns_with_images,
    "an image in a text": write_tags,
    "CogVLM-SFT-311K": write_sft,
    "a folder of labels": write_sft_zh,
    "parquet, bytes": write_parquet_bytes,
    "parquet, messages": write_parquet_messages,
    "tar": write_tar,
}
"""How each layout is written, into a folder that holds the images."""
