"""README, docs and cards say what the results say, their links lead somewhere, and their code runs."""

import ast
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import result_tables as results  # noqa: E402
from result_tables import drift, load, mean, over_seeds, run  # noqa: E402

from diffusers_ctx.evaluation import parse_evaluation_arguments  # noqa: E402
from diffusers_ctx.training import parse_training_config  # noqa: E402


PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/*/*.md", "benchmarks/*.md", "diffusers_ctx/assets/*/README.md")
    for path in ROOT.glob(pattern)
)
MEASURED_PAGES = [ROOT / name for name in results.PAGES]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without generated tables, code and addresses, on one line."""
    text = results.without_tables(page.read_text(encoding="utf-8"))
    text = re.sub(r"\A---\n.*?\n---\n|```.*?```|`[^`\n]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return " ".join(text.split())


# Tables and numbers


@pytest.mark.parametrize("page", MEASURED_PAGES, ids=name_of)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert results.filled(text) == text, "Run `python docs/result_tables.py`."


def test_a_changed_digit_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "| **0.940** |" in text
    changed = text.replace("| **0.940** |", "| **0.941** |")
    assert results.filled(changed) == text


def facts() -> dict[str, list[str]]:
    """Sentences with numbers, as the results have them, by page."""
    shipped, fresh = (load(f"quad-context{suffix}.json") for suffix in ("", "-fresh"))
    ours = [run("ours", seed) for seed in range(3)]
    guided = {scales: found for scales, found in load("quad-context-guidance.json").items() if "," in scales}
    shown = {scales: np.mean([m["shape_met"] for m in found.values()]) for scales, found in guided.items()}
    kept = {scales: found["quad1+quad4"]["conformity"] for scales, found in guided.items()}
    auroc = {name: run(name)["graph"]["auroc"] for name in ("full", "ours-reduced", "amortized")}
    few = {images: run("ours", images=images)["graph"] for images in (1000, 300, 100)}
    longer = {count: mean(run("labels-only", steps=2000)["contexts"], count) for count in (1, 2, 3)}
    minutes_of_longer = run("labels-only", steps=2000)["seconds"] / 60
    pooled = run("base-pooled")["contexts"]
    independent = run("ours", variant="independent")["contexts"]
    gap = {name: over_seeds(name, lambda c: mean(c, 2) - mean(c, 1)) for name, _ in results.METHODS.values()}
    drifts = {name: over_seeds(name, drift) for name, _ in results.METHODS.values()}
    ratios = [drift(row["contexts"]) / drift(row["contexts"], "drift_real") for row in ours]
    drift_of_ours = [drift(row["contexts"]) for row in ours]
    raw = {count: mean(shipped["contexts"], count, "swd") for count in (1, 2, 3)}
    minutes = [row["seconds"] / 60 for row in ours]
    adapters = {
        name: load("full_size_h100.json")[name]["lora"]["learned_parameters"] for name in ("sd15-tf32", "sdxl-bf16")
    }
    step = load("full_size_h100.json")["sd15-tf32"]["lora"]["median_ms"] / 1000
    weights = {name: case["optimizer_parameters"] for name, case in load("train_step.json")["cases"].items()}
    epsilon = {
        name: row["contexts"]["quad4"]["debiased"] for name, row in load("epsilon_base.json")["methods"].items()
    }
    once = load("quad-context-counterfactuals.json")["composition"]
    matched = [
        value for key, value in load("quad-context-prompts.json").items() if isinstance(value, dict) and "any" in value
    ]
    met = {key: [round(100 * row[key]["shape_met"]) for row in matched] for key in ("any", "matching")}
    shapes = {key: f"{min(shares)} to {max(shares)} %" for key, shares in met.items()}
    sides = [abs(end - row[key]["swd"]) for row in matched for key in row for end in row[key]["interval"]]
    reader = load("quad-context-concepts.json")["correlations"]
    quads = {f"{reader[name]:.2f}" for name in results.CONCEPTS[:4]}

    # what is said in words
    assert all(row["graph"]["auroc"] == 1 and row["graph"]["shd"] == 0 for row in (*ours, {"graph": few[1000]}))
    assert shipped["graph"]["auroc"] == 1 and shipped["graph"]["shd"] == 3
    assert run("frozen")["graph"]["strengths"] == ours[0]["graph"]["strengths"]
    assert len(quads) == 1
    singles = {name: shipped["contexts"][name]["debiased"] for name in results.CONCEPTS}
    assert min(singles, key=singles.__getitem__) == "size"
    assert 0.2 < 1 - shipped["contexts"]["size"]["conformity"] < 0.3  # a quarter
    assert [len(seeds) for _, seeds in results.METHODS.values()].count(1) == 15 and len(results.METHODS) == 18
    assert (
        max(drifts, key=drifts.__getitem__) == "paper-vae"
        and drifts["posterior-untold"] == sorted(drifts.values())[-2]
    )

    weights_of_base = (ROOT / "diffusers_ctx" / "assets" / "quad-base").glob("*/*.safetensors")
    parameters = sum(tensor.numel() for file in weights_of_base for tensor in load_file(file).values())
    base = {steps: found["debiased"] for steps, found in load("quad-base.json")["num_inference_steps"].items()}
    gigabytes = f"{4 * adapters['sdxl-bf16'] / 1e9:.1f} GB in float32"
    return {
        "README.md": [
            f"5,000 steps of SD 1.5 take about {5000 * step / 60:.0f} minutes on one H100",
            f"took {min(minutes):.0f} to {max(minutes):.0f} minutes of a CPU core",
            f"an adapter has {adapters['sd15-tf32'] / 1e6:.1f} M weights for SD 1.5 and"
            f" {adapters['sdxl-bf16'] / 1e6:.0f} M for SDXL ({gigabytes})",
        ],
        "docs/training.md": [
            f"do(quad4) is at {epsilon['epsilon']:.3f} without the flags and at"
            f" {epsilon['v-prediction-lora']:.3f} with them",
            f"graph is lost (AUROC {few[300]['auroc']:.2f}), with 100 it is a guess (AUROC {few[100]['auroc']:.2f})",
            f"An SDXL adapter has {adapters['sdxl-bf16'] / 1e6:.0f} M weights and takes {gigabytes}",
        ],
        "docs/sampling.md": [
            f"met in {shown['1, 1']:.2f} of samples at 1, {shown['5, 1']:.2f} at 5 and {shown['7.5, 1']:.2f} at 7.5,"
            " and conformity under do(quad1, quad4) is"
            f" {kept['1, 1']:.2f}, {kept['5, 1']:.2f} and {kept['7.5, 1']:.2f}",
            f"At 2, that conformity falls to {kept['1, 2']:.2f}",
            f"within the bootstrap intervals (95 %: {min(sides):.3f} to {max(sides):.3f} to either side)",
            f"with an error of {once['once']:.3f}, of which most is the autoencoder's"
            f" ({once['once, against the autoencoded image']:.3f} without it)",
        ],
        "docs/results.md": [
            f"two sets of real images are at {drift(ours[0]['contexts'], 'drift_real'):.3f}",
            f"the first row's drift of {drifts['ours']:.3f} is {min(ratios):.1f} to {max(ratios):.1f} there, by seed",
            f"the gap is {gap['ours']:.3f}. It is {gap['labels-only']:.3f} for context labels alone,"
            f" {gap['lora-per-context']:.3f} for added LoRAs and {gap['prompt-lora']:.3f} for named contexts",
            "AUROC 1.00 in three seeds",
            f"which reads latents, has {auroc['full']:.2f}. In reduced form, blocks are total effects and no edges"
            f" ({auroc['ours-reduced']:.2f})",
            f"no closer** (pairs {mean(run('ours-graph')['contexts'], 2):.3f})",
            f"(AUROC {auroc['amortized']:.2f}, pairs {mean(run('amortized')['contexts'], 2):.3f})",
            f", earlier code), pairs are at {mean(run('ours-latents')['contexts'], 2):.3f}",
            f"a LoRA trained on it alone is at {mean(run('base')['contexts'], 0):.3f}, the context adapter at"
            f" {over_seeds('ours', lambda c: mean(c, 0)):.3f}",
            f"is at {base['6']:.3f} from its training distribution at six steps and at {base['25']:.3f} at 25",
            f"took {min(minutes):.0f} to {max(minutes):.0f} minutes of a core",
            f"(3,000, {minutes_of_longer:.0f} minutes) are at {longer[1]:.3f}, {longer[2]:.3f} and {longer[3]:.3f}",
            f"The light VAE had {run('paper-vae')['seconds'] / 60:.1f} minutes",
            f"trains {weights['lora']:,} weights, a plain LoRA {weights['plain-lora']:,}",
            f"Ours, raw: [{raw[1]:.3f} and {raw[2]:.3f} here, {mean(independent, 1, 'swd'):.3f} and"
            f" {mean(independent, 2, 'swd'):.3f} on the independent variant (n = 1,000, floor"
            f" {mean(independent, 2, 'floor'):.3f})",
            f"a LoRA that never heard of contexts is at {pooled['orientation']['debiased']:.3f} under do(orientation),"
            f" and at {mean(pooled, 0):.3f} in the observational",
            f"by {drift(shipped['contexts']):.3f} of their range in the shipped adapter and"
            f" {min(drift_of_ours):.3f} to {max(drift_of_ours):.3f} in the three",
            f"from {min(drifts[name] for name in drifts if name != 'autoencoder'):.3f} (context labels alone) to"
            f" {drifts['posterior-untold']:.3f} (amortized without the context), the light VAE by"
            f" {drifts['paper-vae']:.3f}",
            f"pairs are {raw[2] / raw[1]:.2f} and triples {raw[3] / raw[1]:.2f} times as far",
            f"Their mean distance is {mean(fresh['contexts'], 2):.3f} for the six pairs and"
            f" {mean(fresh['contexts'], 3):.3f} for the triple",
        ],
        "diffusers_ctx/assets/quad-base/README.md": [f"for 64x64 pixels ({parameters / 1e6:.1f} million parameters)"],
        "diffusers_ctx/assets/quad-context/README.md": [
            f"edges among the concepts: {shipped['graph']['auroc']:.2f}",
            f"are {drift(shipped['contexts']) / drift(shipped['contexts'], 'drift_real'):.1f} times as far",
            f"{min(quads)} for the quads, {reader['size']:.2f} for size and"
            f" {reader['orientation']:.2f} for orientation",
            f"met in {shapes['matching']} of the samples, and in {shapes['any']} with",
        ],
    }


# numbers that are no measurements of ours, or whose source is no results file
OTHER_NUMBERS = (
    r"arXiv \d{4}\.\d{5}",
    r"(Python|SD|Diffusion|xformers|Accelerate|apache-|Apache-) ?\d+(\.[\dx]+)+",
    r"Stable Diffusion 3, 3\.5",
    r"central 99 % interval",
    r"differences (of|below) 0\.01 (are|is) noise",
    r"\(targets?: [^)]*\)",
    r"7\.5 by default",
    r"a constant 1e-4, 0\.2 and random crops",
    r"weights \(2\.5 MB\)",  # 624,192 of 4 bytes
    r"11\.4 minutes",  # the budget that the VAE was given
    r"by about 0\.005; at n = 500, debiased distances are off by up to 0\.02",  # the notebook
    r"The paper publishes .* 3DIdent 0\.014 and 0\.051",
)


@pytest.mark.parametrize("page", MEASURED_PAGES, ids=name_of)
def test_numbers_in_prose_are_those_of_the_results(page):
    text = prose(page)
    for fact in facts().get(name_of(page), []):
        assert fact in text
        text = text.replace(fact, " ")
    for pattern in OTHER_NUMBERS:
        text = re.sub(pattern, " ", text)
    unknown = [text[max(0, m.start() - 60) : m.end() + 20] for m in re.finditer(r"\d+\.\d+|\d+ %", text)]
    assert not unknown, "Add them to `facts`, with where they come from."


def test_debiased_distances_are_recomputed():
    """The tables are made of `debiased`; that is the distance with the floor taken off."""
    contexts = [*run("ours")["contexts"].values(), *load("quad-context.json")["contexts"].values()]
    for found in contexts:
        expected = np.sqrt(max(0.0, found["swd"] ** 2 - found["floor"] ** 2))
        assert found["debiased"] == pytest.approx(expected, abs=1e-9)


# README and links


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for address in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", address):
            continue
        path, _, anchor = address.partition("#")
        target = page if not path else page.parent / path
        assert target.exists(), address
        if anchor:
            assert anchor in anchors(target), address


def test_the_notebook_lists_all_entries():
    folder = ROOT / "docs" / "notebook"
    listed = re.findall(r"\]\((\d\d-[^)]*\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


# Code


def snippets(page: Path, language: str = "python") -> list[str]:
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [code for name, code in blocks if name == language]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page):
    for code in [*snippets(page), *snippets(page, "python no-run")]:
        ast.parse(code)


# Kinds of code blocks that no test runs, by what they begin with, and why. All others are run: Python blocks here,
# those of the tutorial by test_tutorial.py.
NOT_RUN = {
    "python no-run": "needs an adapter of the reader's own, and an account on the Hub",
    "bibtex": "is not code",
    "text": "is a drawing",
    "photos/": "shows a folder",
    "Samples of the shipped adapter": "shows what a command prints",
    "z = ": "is an equation",
    "pip install": "needs the network; the gate installs the package with `make install`",
    "make ": "is what runs this test, or takes minutes: `make demo` is train_scripts/demo_quad.py",
    "accelerate launch": "needs a base model of gigabytes, several processes or hours; flags are parsed below",
    "python train_scripts/": "takes minutes; tests/test_train_base.py runs the script",
    "diffusers-ctx ": "needs adapters and pictures of the reader's own; tests/commands runs the commands",
    "python benchmarks/": "takes minutes, or downloads pictures; tests/benchmarks runs the scripts",
    "FOLDERS=": "belongs to the command below it",
    "WEIGHTS=": "belongs to the command below it",
}
RUN_ELSEWHERE = {"docs/tutorial.md": "test_tutorial.py"}
PYTHON_PAGES = [page for page in PAGES if snippets(page) and name_of(page) not in RUN_ELSEWHERE]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_runs_on_what_comes_with_the_library(page, tmp_path, monkeypatch):
    set_timesteps = DDIMScheduler.set_timesteps

    def set_few_timesteps(scheduler: DDIMScheduler, steps: int, *arguments, **options) -> None:
        set_timesteps(scheduler, min(steps, 3), *arguments, **options)  # not the default of 50

    monkeypatch.setattr(DDIMScheduler, "set_timesteps", set_few_timesteps)
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):

        def get_timesteps(pipeline, num_inference_steps: int, strength, device, get=kind.get_timesteps):
            return get(pipeline, min(num_inference_steps, 3), strength, device)  # of which they leave out some

        monkeypatch.setattr(kind, "get_timesteps", get_timesteps)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for code in snippets(page):
        exec(compile(code, str(page), "exec"), namespace)


def commands(page: Path) -> list[str]:
    """What is in code blocks that are not Python: each command, or the first line of anything else."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
    found = []
    for language, block in fenced.findall(text):
        if language != "python":
            lines = block.replace("\\\n", " ").splitlines()
            shown = language or "Samples of" in lines[0]
            found += [language or lines[0]] if shown else lines
    outside = fenced.sub("", text)
    return found + [
        line.strip() for line in re.findall(r"(?<=\n\n)((?: {4}\S.*\n)+)(?=\n)", outside) for line in line.splitlines()
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in RUN_ELSEWHERE], ids=name_of)
def test_code_that_is_not_run_is_of_a_listed_kind(page):
    assert [line for line in commands(page) if not line.startswith(tuple(NOT_RUN))] == []


def test_every_listed_kind_exists():
    found = [line for page in PAGES for line in commands(page)]
    assert [kind for kind in NOT_RUN if not any(line.startswith(kind) for line in found)] == []


def test_training_commands_are_understood():
    """Those of README, docs and cards: every flag exists, and values are of their types."""
    found = 0
    for page in PAGES:
        for block in snippets(page, ""):
            for command in block.replace("\\\n", " ").splitlines():
                if "train_scripts/train_context" in command and "..." not in command:
                    words = shlex.split(command)
                    script = next(i for i, word in enumerate(words) if word.startswith("train_scripts/"))
                    config = parse_training_config(words[script + 1 :])
                    assert config.data.train_data_dir or config.data.dataset_name
                    found += 1
    assert found >= 4


def test_evaluation_commands_are_understood():
    found = 0
    for page in PAGES:
        for block in snippets(page, ""):
            for command in block.replace("\\\n", " ").splitlines():
                if "train_scripts/evaluate_context_adapter.py" in command:
                    arguments = shlex.split(command.split("evaluate_context_adapter.py")[1])
                    assert parse_evaluation_arguments("", arguments).adapter
                    found += 1
    assert found >= 2


def test_flags_exist():
    """Every flag that a page names is one of a program here, or of one that the page starts."""
    sources = [
        path
        for folder in ("diffusers_ctx", "train_scripts", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources if path != Path(__file__))
    others = {"config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"}
    others |= {"dynamo_backend", "kill-on-bad-exit", "index-url"}
    for page in PAGES:
        if page.parent.name != "notebook":
            for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", page.read_text(encoding="utf-8"))) - others:
                assert re.search(rf"\b{flag}\b", code), f"{name_of(page)}: --{flag}"


# Failures, and the map of the code


def messages() -> list[re.Pattern]:
    """The texts in the code, with a wildcard for each value in them."""
    found = []
    for folder in ("diffusers_ctx", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [re.escape(part.value) if _is_text(part) else ".+" for part in parts]
                if sum(len(part.value) for part in parts if _is_text(part)) > 20:
                    found.append(re.compile("".join(texts)))
    return found


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_messages_of_failures_are_those_of_the_code():
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    quoted = [
        " ".join(quote.replace("\n> ", " ").split()) for quote in re.findall(r"(?:^> .*\n)+", page, re.MULTILINE)
    ]
    quoted = [quote.removeprefix("> ") for quote in quoted]
    known = messages()
    assert len(quoted) > 25
    assert [quote for quote in quoted if not any(message.fullmatch(quote) for message in known)] == []


def test_imports_run_one_way():
    """As the architecture page lists the parts: each imports only those below it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = re.findall(r"^\| \d+ \| `(\w+)", page, flags=re.MULTILINE)
    found = {path.stem for path in (ROOT / "diffusers_ctx").iterdir()} - {"__init__", "__pycache__", "assets", "py"}
    assert found <= set(order), "List it on the page."
    modules = {path: path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "diffusers_ctx").rglob("*.py")}
    modules |= {path: ("diffusers_ctx", "pipelines", path.stem) for path in (ROOT / "pipelines").glob("*.py")}
    upward = []
    for path, (_, *parts) in modules.items():
        for imported in _imported_parts(path, parts) if len(parts) > 1 or parts[0] in order else ():
            if imported != parts[0] and order.index(imported) < order.index(parts[0]):
                upward.append(f"{name_of(path)} imports {imported}")
    assert upward == []


def _imported_parts(path: Path, parts: list[str]) -> set[str]:
    """The parts of the library that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = ["diffusers_ctx", *parts[: len(parts) - node.level], *module]
            if module[0] == "diffusers_ctx":
                found |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
    return found


def test_the_site_has_all_pages():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []
