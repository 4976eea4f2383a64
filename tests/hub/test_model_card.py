import ast
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusers_ctx.hub import render_model_card, save_model_card

from .conftest import CONFIG


RESULTS = {
    "dataset": "400 held-out photos",
    "metrics": {"sliced Wasserstein distance": {"obs": 0.05, "night + snow": 0.11234567}, "conformity": {"night": 1}},
    "references": {"real against real": {"obs": 0.038}},
}


def table_below(card: ModelCard, heading: str) -> list[list[str]]:
    """Cells of the first table in the section, without the line of dashes."""
    section = card.text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(set(cell) <= set("-:") for cell in rows[1])
    return [rows[0], *rows[2:]]


def test_metadata():
    card = render_model_card(CONFIG, repo_id="ada/weather", license="apache-2.0")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "some-org/some-base",
        "base_model_relation": "adapter",
        "tags": ["diffusers", "stable-diffusion", "context-adapter", "causal", "lora"],
    }
    assert "lora" not in render_model_card(CONFIG | {"mode": "frozen"}).data.tags


def test_a_license_that_nobody_gave_is_not_invented():
    card = render_model_card(CONFIG)
    assert "license" not in card.data.to_dict()
    assert "named no license" in card.text
    assert "named no license" not in render_model_card(CONFIG, license="mit").text


def test_a_saved_card_reads_back_the_same(tmp_path):
    card = render_model_card(CONFIG, results=RESULTS)
    loaded = ModelCard.load(save_model_card(card, tmp_path))
    assert (loaded.data.to_dict(), loaded.text) == (card.data.to_dict(), card.text)


def test_concepts_are_listed_in_order_and_cannot_break_their_table():
    rows = table_below(render_model_card(CONFIG | {"concepts": ["snow", "night|fog"]}), "Concepts")
    assert rows[1:] == [
        ["obs (observational)", "`interventions=[]`"],
        ["snow", '`interventions=["snow"]`'],
        [r"night\|fog", r'`interventions=["night\|fog"]`'],
    ]


def test_the_example_is_python_that_composes_this_adapters_concepts():
    text = render_model_card(CONFIG | {"concepts": ['a "night"', "snow", "fog"]}, repo_id="ada/weather").text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert "ComposablePipeline.from_pretrained('some-org/some-base')" in calls
    assert "pipe.load_context_adapter('ada/weather')" in calls
    assert "pipe(prompt)" in calls
    assert """pipe(prompt, interventions=['a "night"', 'snow'])""" in calls
    assert """pipe(prompt, interventions={'a "night"': 0.5})""" in calls


@pytest.mark.parametrize(
    "base", ["/home/ada/models/secret-base", "models/secret-base", r"C:\ada\secret-base", "./x/y", "secret-base", None]
)
def test_a_local_base_is_not_given_away(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/secret-base").mkdir(parents=True)
    card = render_model_card(CONFIG | {"base_model_name_or_path": base})
    assert not {"base_model", "base_model_relation"} & set(card.data.to_dict())
    assert "secret-base" not in str(card)
    assert "for a local checkpoint" in card.text


def test_the_example_loads_the_base_that_comes_with_the_library():
    config = CONFIG | {"base_model_name_or_path": "embedded_base()"}
    text = render_model_card(config, repo_id="ada/quad").text
    assert "for the small Stable Diffusion that comes with diffusers_ctx" in text
    assert "from diffusers_ctx import ComposablePipeline, embedded_base\n" in text
    assert "ComposablePipeline.from_pretrained(embedded_base())\n" in text
    own = render_model_card(config | {"mode": "full"}, repo_id="ada/quad").text  # of which nothing else is needed
    assert 'ComposablePipeline.from_pretrained("ada/quad")\n' in own


@pytest.mark.parametrize("results", [None, {}, {"dataset": "400 photos"}, {"dataset": "400 photos", "metrics": {}}])
def test_nothing_measured_is_said_and_no_figure_shown(results):
    card = render_model_card(CONFIG, repo_id="ada/weather", results=results)
    assert "## What was measured\n\nNothing was measured.\n" in card.text
    assert "model-index" not in card.data.to_dict()


def test_what_was_measured_is_shown_beside_its_references():
    card = render_model_card(CONFIG, repo_id="ada/weather", results=RESULTS)
    assert "Measured on 400 held-out photos." in card.text and "Nothing was measured" not in card.text
    assert table_below(card, "What was measured") == [
        ["Context", "sliced Wasserstein distance", "conformity", "real against real"],
        ["obs", "0.05", "-", "0.038"],
        ["night + snow", "0.1123", "-", "-"],
        ["night", "-", "1", "-"],
    ]


def test_the_metadata_holds_the_adapters_own_finite_figures():
    metrics = RESULTS["metrics"] | {"broken": {"obs": float("nan")}}
    card = render_model_card(CONFIG, repo_id="ada/weather", results=RESULTS | {"metrics": metrics})
    (index,) = card.data.to_dict()["model-index"]
    (result,) = index["results"]
    assert index["name"] == "weather"
    assert result["task"] == {"type": "text-to-image"}
    assert result["dataset"] == {"name": "400 held-out photos", "type": "400-held-out-photos"}
    assert [(metric["type"], metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("sliced-wasserstein-distance", "sliced Wasserstein distance, obs", 0.05),
        ("sliced-wasserstein-distance", "sliced Wasserstein distance, night + snow", 0.11234567),
        ("conformity", "conformity, night", 1.0),
    ]
    assert ["obs", "0.05", "-", "nan", "0.038"] in table_below(card, "What was measured")


def test_how_it_was_trained():
    card = render_model_card(
        CONFIG,
        training={
            "command": ["accelerate", "launch", "train.py", "--seed=0", "--validation_prompt", "a street"],
            "seed": 0,
            "commit": "0123abc",
            "machine": "2 CPU cores",
            "versions": {"torch": "2.13.0"},
            "hyperparameters": {"learning_rate": 1e-4, "concepts": ["night", "snow"], "max_grad_norm": None},
        },
    )
    assert "```\naccelerate launch train.py --seed=0 --validation_prompt 'a street'\n```" in card.text
    assert table_below(card, "How it was trained")[1:] == [
        ["seed", "`0`"],
        ["commit", "`0123abc`"],
        ["machine", "`2 CPU cores`"],
        ["torch", "`2.13.0`"],
        ["learning_rate", "`0.0001`"],
        ["concepts", "`night, snow`"],
    ]


def test_training_that_nobody_recorded():
    assert "How it was trained was not recorded." in render_model_card(CONFIG).text
    assert "not recorded" not in render_model_card(CONFIG, training={"command": ["train.py"]}).text
    assert "not recorded" not in render_model_card(CONFIG, training={"seed": 0}).text


@pytest.mark.parametrize("flag", [["--hub_token", "s3cret"], ["--hub_token=s3cret"], ["--hub", "hf_" + "s3cret" * 5]])
def test_tokens_and_the_folders_of_a_machine_stay_off_the_card(flag):
    command = ["/home/ada/train.py", *flag, "--output_dir", "/home/ada/out", "--data=/home/ada/photos"]
    hyperparameters = {"hub_token": "s3cret", "output_dir": "/home/ada/out", "tokens_per_concept": 4}
    text = str(render_model_card(CONFIG, training={"command": command, "hyperparameters": hyperparameters}))
    assert "s3cret" not in text and "/home" not in text
    assert "--output_dir .../out --data=.../photos" in text
    assert "| tokens_per_concept | `4` |" in text


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"results": {"dataset": "photos", "metric": {}}}, "metric"),
        ({"results": {"metrics": {"swd": {"obs": 0.1}}}}, "`dataset`"),
        ({"training": {"sed": 1}}, "sed"),
    ],
)
def test_what_the_card_would_leave_out_is_an_error(given, word):
    with pytest.raises(ValueError, match=word):
        render_model_card(CONFIG, **given)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_each_mode_says_what_was_trained(mode):
    words = {
        "frozen": "Only the adapter was trained",
        "lora": "`pytorch_lora_weights.safetensors`",
        "full": "own weights were trained",
    }
    text = render_model_card(CONFIG | {"mode": mode}).text
    assert [name for name, word in words.items() if word in text] == [mode]
    base = "some-org/some-base" if mode != "full" else "path/to/this/folder"
    assert f'ComposablePipeline.from_pretrained("{base}")' in text


def test_tokens_in_the_prompt_are_told():
    words = "takes 0 and 1 alone"
    assert words in render_model_card(CONFIG | {"injection": "prompt"}).text
    assert words not in render_model_card(CONFIG | {"injection": "cross_attention"}).text
    assert words not in render_model_card(CONFIG).text


def test_the_paper_is_cited():
    text = render_model_card(CONFIG).text
    assert "https://arxiv.org/abs/2507.04754" in text and "@inproceedings{" in text


def test_our_own_stale_card_is_overwritten_and_nobody_elses(tmp_path):
    path = save_model_card(render_model_card(CONFIG), tmp_path)
    save_model_card(render_model_card(CONFIG, results=RESULTS), tmp_path)
    assert "400 held-out photos" in path.read_text()
    path.write_text("# A card of my own\n")
    save_model_card(render_model_card(CONFIG), tmp_path)
    assert path.read_text() == "# A card of my own\n"
