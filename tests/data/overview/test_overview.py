"""What `sat-lora data` says of data, and what it shows as trained on."""

import json
import re
from html.parser import HTMLParser

import pytest

from sat_lora.cli import main
from sat_lora.data.overview.examine import evenly, examine, pieces_of
from sat_lora.data.overview.texts import lines_of, page, rows_of, sample_lines
from sat_lora.data.reading import Reading
from sat_lora.errors import DataError
from tests.support.datasets import dataset
from tests.support.layouts import LAYOUTS, SEVERAL, lines, write_pictures
from tests.support.tar_shards import png


def overview_of(paths, tokenizer, pictures=100, **settings):
    data = dataset([], tokenizer, **{"version": "chat", "max_length": 120, **settings})
    return examine([str(path) for path in paths], Reading(), data, pictures, lambda items, what: items), data


def test_counts_lengths_and_faults_are_said(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    (tmp_path / "same.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "torn.png").write_bytes(png()[:40])
    records = [
        {"image": "a.png", "prompt": "q", "answer": "x", "id": 1},
        {"image": "a.png", "prompt": "q", "answer": "x"},
        {"image": "a.png", "prompt": "q", "answer": "y"},
        {"image": "same.png", "prompt": "q", "answer": "x"},
        {"image": "torn.png", "prompt": "q", "answer": "x"},
        {"image": "none.png", "prompt": "q", "answer": "x"},
        {"prompt": "q", "answer": "z" * 500},
        {"image": "b.png", "prompt": "q2", "answer": "a2", "history": [["q1", "a1"]]},
    ]
    overview, data = overview_of([lines(tmp_path / "d.jsonl", records)], tokenizer)
    assert (overview.samples, overview.text_only, overview.several_turns, overview.cut) == (8, 1, 1, 1)
    assert (overview.repeated, overview.contradicted, overview.same_pictures) == (1, 1, 2)
    assert (overview.pictures, overview.looked_at, overview.smaller) == (5, 3, 0)
    assert {place.rpartition(" ")[2] for place in overview.broken} == {"5", "6"}
    assert dict(overview.unused)['times "id" (not read)'] == 1
    text = lines_of(rows_of(overview, data))
    whole = len(data.lay_out(overview.items[6]).input_ids) + data.lay_out(overview.items[6]).left_out
    assert f"1 of 8 answers; --max_length {whole} would hold them" in text
    assert "8 jsonl: prompt and answer" in text and "torn.png" in text and "none.png" in text


def test_a_line_for_each_layout(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    for number, (layout, write) in enumerate(LAYOUTS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_pictures(folder, SEVERAL)
        overview, _ = overview_of([write(folder, SEVERAL)], tokenizer)
        assert overview.samples == 2 and overview.several_turns == 1 and not overview.broken, layout
        assert overview.looked_at == 2 and [*overview.layouts.values()] == [2]


def test_what_is_trained_on_is_marked(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    overview, data = overview_of([LAYOUTS["LLaVA"](tmp_path, SEVERAL)], tokenizer)
    text = sample_lines(overview.items, data)
    talk = "«4<eos>» [INST] The first? [/INST] «7<eos>» [INST] Backwards? [/INST] «2qK7<eos>»"
    assert f"  <bos><image> [INST] How many? [/INST] {talk}\n" in text and "«a dog<eos>»" in text
    data.learns_all = False
    assert "[/INST] 4 [INST] The first? [/INST] 7 [INST]" in sample_lines(overview.items, data)
    sample = data.lay_out(overview.items[1])
    pieces = pieces_of(sample, tokenizer.decode)
    learnt = [text for kind, text in pieces if kind == "learnt"]
    assert learnt == ["a dog<eos>"] and [kind for kind, _ in pieces] == ["given", "image", "given", "learnt"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def test_a_page_holds_its_pictures_and_no_text_of_the_data_is_markup(tmp_path, tokenizer):
    write_pictures(tmp_path, SEVERAL)
    evil = "<script>alert(1)</script><img src=x onerror=y>\"'&"
    records = [
        {"image": "a.png", "prompt": evil, "answer": f"{evil} [[100,100,500,500]]"},
        {"prompt": "\u202e\x1b[2J", "answer": "x"},
    ]
    overview, data = overview_of([lines(tmp_path / f"<b>{'&'}.jsonl", records)], tokenizer, max_length=300)
    text = page("<i>title</i>", rows_of(overview, data), overview.items, data)
    parsed = Page(text)
    assert "script" not in parsed.tags and parsed.tags.count("img") == 1 and "b" not in parsed.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in parsed.sources)
    assert "default-src 'none'" in text and "&lt;script&gt;" in text and "<mark>" in text


def test_more_than_is_looked_at_is_spread_evenly():
    assert evenly(range(10), 3) == [0, 3, 6] and evenly(range(2), 5) == [0, 1] and evenly([], 3) == []


def test_a_layout_that_is_none_is_the_error_of_a_run(tmp_path, tokenizer):
    (tmp_path / "d.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(DataError, match="those of COCO"):
        overview_of([tmp_path / "d.json"], tokenizer)


def test_the_command_prints_and_writes_and_replaces_no_other_file(tmp_path, capsys):
    write_pictures(tmp_path, SEVERAL)
    path = str(LAYOUTS["LLaVA"](tmp_path, SEVERAL))
    out = tmp_path / "report.html"
    assert main(["data", path, "--html", str(out), "--version", "chat", "--samples", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 json: LLaVA/ShareGPT conversations" in said and "«" in said
    assert out.read_text().startswith("<!doctype html>")
    assert main(["data", path, "--html", str(out), "--samples", "0", "--version", "chat"]) == 0
    other = tmp_path / "mine.html"
    other.write_text("mine")
    assert main(["data", path, "--html", str(other)]) == 2
    assert "mine.html exists and is no page of sat-lora data" in capsys.readouterr().err and other.read_text() == "mine"
    assert main(["data"]) == 2 and "no data named" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("order", ["first", "last", "between"])
def test_paths_may_stand_anywhere_among_the_options(order, tmp_path, base_folder, capsys):
    records = [{"image": "a.png", "answer": "x"}, {"image": "b.png", "answer": "y"}]
    write_pictures(tmp_path, SEVERAL)
    paths = [str(lines(tmp_path / f"{number}.jsonl", records[number:])) for number in range(2)]
    some, others = ["--prompt", "x"], ["--from_pretrained", str(base_folder), "--version", "base"]
    words = {
        "first": [*paths, *some, *others],
        "last": [*some, *others, *paths],
        "between": [paths[0], *some, paths[1], *others],
    }
    assert main(["data", *words[order]]) == 0
    assert re.search(r"^samples +3$", capsys.readouterr().out, re.M)
    with pytest.raises(SystemExit) as stop:
        main(["data", *words[order], "--larning-rate=3"])
    assert stop.value.code == 2
    assert "unknown: --larning-rate=3; did you mean --lr?" in capsys.readouterr().err
