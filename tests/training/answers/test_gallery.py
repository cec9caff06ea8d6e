"""The page of answers: nothing of the texts runs, the worst comes first, and it does not grow without end."""

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sat_lora.data.samples import Item
from sat_lora.errors import ConfigError
from sat_lora.training.answers import gallery as gallery_module
from sat_lora.training.answers.gallery import gallery, gallery_file, refuse_other_page, write_gallery
from sat_lora.training.answers.prediction import Evaluated, Prediction, scores_of
from sat_lora.training.metrics.generated import load_metric

NASTY = '<script>alert(1)</script> "quotes" \' & <img src=x onerror=alert(1)> \u202egnirts \x1b[31m </td></table>'


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def picture():
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    return content.getvalue()


def evaluated(answers, said, metric="exact-match", image=None, **more):
    predictions = [
        Prediction(
            index=number,
            sample=f"{number}.png",
            prompt="?",
            references=(answer,),
            answers={"base": "-", "adapter": text},
            **more,
        )
        for number, (answer, text) in enumerate(zip(answers, said))
    ]
    scores = scores_of(predictions, {metric: load_metric(metric)})
    samples = [Item(image or picture(), answer) for answer in answers]
    return Evaluated(result={}, predictions=predictions, scores=scores, samples=samples)


def test_nothing_of_the_texts_is_obeyed():
    measured = evaluated([NASTY], [NASTY])
    nasty = Prediction(index=0, sample=NASTY, prompt=NASTY, references=(NASTY,), answers={NASTY: NASTY})
    scores = scores_of([nasty], {"exact-match": load_metric("exact-match")})
    page = gallery(Evaluated(result={}, predictions=[nasty], scores=scores, samples=measured.samples), 10**6)
    plain = Tags(gallery(evaluated(["a"], ["a"]), 10**6))
    tags = Tags(page)
    allowed = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in tags.tags} <= allowed and "script" not in allowed
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    images = [attributes["src"] for tag, attributes in tags.tags if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/jpeg;base64,")
    assert not {"\u202e", "\x1b"} & set(page)
    shown = NASTY.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert tags.text.count(shown) == 7  # sample, question, right answer, what was said, and thrice who says it
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_the_worst_comes_first():
    page = gallery(evaluated(["aaa", "bbb", "ccc", "ddd"], ["aaa", "xxx", "ccc", "yyy"]), 10**6)
    places = [page.index(f"<h2>{number}.png") for number in (1, 3, 0, 2)]
    assert places == sorted(places)


def test_where_lower_is_better_the_highest_comes_first():
    measured = evaluated(["a", "b"], ["a", "b"], "perplexity", answer_losses={"base": (1.0, 1), "adapter": (1.0, 1)})
    second = Prediction(**{**vars(measured.predictions[1]), "answer_losses": {"base": (1.0, 1), "adapter": (9.0, 1)}})
    predictions = [measured.predictions[0], second]
    scores = scores_of(predictions, {"perplexity": load_metric("perplexity")})
    page = gallery(Evaluated(result={}, predictions=predictions, scores=scores, samples=measured.samples), 10**6)
    assert page.index("<h2>1.png") < page.index("<h2>0.png")


def test_it_has_a_limit_in_samples_and_in_size(monkeypatch):
    monkeypatch.setattr(gallery_module, "MOST", 5)
    many = evaluated([str(n) for n in range(9)], ["x"] * 9)
    page = gallery(many, 10**6)
    assert page.count("<section>") == 5 and "9, 5 of them here" in page
    monkeypatch.setattr(gallery_module, "ROOM", 2 * len(page) // 5)
    assert gallery(many, 10**6).count("<section>") < 5
    long = evaluated(["a" * 10**6], ["b" * 10**6])
    assert len(gallery(long, 10**6)) < 20_000 + len(page)


def test_a_picture_that_cannot_be_read_is_a_sentence(tmp_path):
    page = gallery(evaluated(["a"], ["a"], image=tmp_path / "<gone>.png"), 10**6)
    assert "&lt;gone&gt;.png" in page and "<img" not in page


def test_only_pages_of_its_own_are_replaced(tmp_path):
    file = gallery_file(tmp_path / "evaluation-2.json", "")
    assert file == tmp_path / "evaluation-2.html" and gallery_file(file, "x.html") == Path("x.html")
    refuse_other_page(file)
    write_gallery(file, evaluated(["a"], ["a"]), 10**6)
    refuse_other_page(file)
    for content in ("<!doctype html><p>mine", '<meta name="generator" content="sat-lora data">'):
        file.write_text(content)
        with pytest.raises(ConfigError, match="exists and is no page of sat-lora evaluate"):
            refuse_other_page(file)
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "its folder does not exist")):
        with pytest.raises(ConfigError, match=words):
            refuse_other_page(path)
