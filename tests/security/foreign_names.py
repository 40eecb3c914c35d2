"""Names in a stranger's files that would become paths, Markdown, shell words or programs."""

from __future__ import annotations

import ast
import json
import shlex
from typing import Any

import pytest
from attack import Attack, Ground
from resigned import change_manifest, change_metadata

from torchprime.data.page import render_page
from torchprime.files.template_files import write_templates

EVIL = "x`` ```\n# own heading <script>alert(1)</script> [a](javascript:b) | $(touch pwned) '; ls '"


def settings(ground: Ground, **changes: Any) -> None:
    path = ground.model() / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def named_templates(name: str) -> Any:
    """A model whose second chat template is named by `name`, in which OUT is the outside folder."""

    def lay(ground: Ground) -> None:
        listed = [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": name.replace("OUT", str(ground.outside)), "template": "pwned"},
        ]
        settings(ground, chat_template=listed)

    return lay


def as_conversations(ground: Ground) -> tuple[str, ...]:
    """Overrides for rows that are rendered by the model's templates."""
    rows = ground.here / "chats.jsonl"
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows.write_text(json.dumps({"messages": said}) + "\n")
    return (f"dataset.file_dataset_path={rows}",)


def other_hf_file(ground: Ground) -> None:
    """A checkpoint whose manifest names a small file of the export outside of it."""
    checkpoint = ground.checkpoint()
    (checkpoint / "evil").write_text("pwned")

    def change(content: dict[str, Any]) -> None:
        facts = content["files"]["hf/config.json"]
        content["files"]["hf/../../../outside/file"] = facts

    change_manifest(checkpoint, change)


def other_shard(ground: Ground) -> None:
    model = ground.model()
    weights = json.dumps({"weight_map": {"lm_head.weight": "../outside/file"}})
    (model / "model.safetensors.index.json").write_text(weights)


def place_of_a_shard(ground: Ground) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../../../../outside/file"

    change_metadata(ground.checkpoint(), change)


def evil_facts(ground: Ground) -> None:
    """A checkpoint whose card would hold code, in every field."""
    path = ground.checkpoint() / "hf" / "export.json"
    facts = json.loads(path.read_text())
    names = {"name": EVIL, "base_model": EVIL, "dataset": EVIL, "command": EVIL}
    facts |= {"base_model": EVIL, "metrics": {EVIL: 1.0}, "template_options": {EVIL: EVIL}}
    facts["card"] |= {**names, "chat": True, "versions": {EVIL: EVIL}}
    path.write_text(json.dumps(facts))
    change_manifest(path.parents[1], lambda content: None)


def card_is_harmless(ground: Ground) -> None:
    """By a reader of its own: what it makes of the card has no element that a value brought."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    tokens = parser.parse((ground.here / "out" / "README.md").read_text())
    every = [*tokens, *(child for token in tokens for child in token.children or [])]
    kinds = [token.type for token in every]
    assert not {"html_block", "html_inline", "link_open", "image"} & set(kinds)
    headings = [t.tag for t in tokens if t.type == "heading_open"]
    assert headings == ["h1", *["h2"] * 5]
    assert kinds.count("fence") == 3
    (shell,) = (t.content for t in tokens if t.type == "fence" and "vllm serve" in t.content)
    words = shlex.split(shell.replace("\\\n", ""))
    assert words[words.index("--served-model-name") + 1] == EVIL
    assert json.loads(words[-1])["model"] == EVIL and words.count("curl") == 1
    (program,) = (t.content for t in tokens if t.type == "fence" and "import" in t.content)
    names = {node.id for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Name)}
    assert names <= {"AutoTokenizer", "AutoModelForCausalLM", "tokenizer", "model", "inputs",
                     "output", "print"}  # fmt: skip


def hostile_page(ground: Ground) -> None:
    """The template of a page of the installation was exchanged."""
    folder = ground.here / "assets" / "report"
    folder.mkdir(parents=True)
    (folder.parent / "page").mkdir()
    (folder / "page.html.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {ground.outside}/pwned') }}}}"
    )
    for name in ("page", "report"):
        (folder.parent / name / "page.css").write_text("")
    ground.monkeypatch.setattr("torchprime.data.page.assets_dir", lambda: ground.here / "assets")


def render_it(ground: Ground) -> tuple[int, str]:
    from jinja2.exceptions import SecurityError

    try:
        return 0, render_page("report")
    except SecurityError as error:
        return 2, f"error: {error}"


def nothing_in(name: str) -> Any:
    def then(ground: Ground) -> None:
        assert not (ground.here / name).exists()

    return then


TEMPLATE = "a chat template is named .*expected letters"

ATTACKS = [
    *(
        Attack(
            f"template named {name!r}, dry run",
            named_templates(name),
            lambda ground: ground.train("dry_run=true", *as_conversations(ground)),
            TEMPLATE,
            then=nothing_in("outputs"),
        )
        for name in ("OUT/evil", "../../outside/evil", "a/../../../outside/evil", "a\x00b")
    ),
    Attack(
        "template named a path, asked by chat",
        named_templates("OUT/evil"),
        lambda ground: ground.torchprime("chat", "--model", ground.model(), "--prompt", "a"),
        TEMPLATE,
    ),
    Attack(
        "template named a path, new tokens, prepare",
        named_templates("OUT/evil"),
        lambda ground: ground.prepare(
            "model.add_special_tokens=['<a>']", *as_conversations(ground)
        ),
        TEMPLATE,
    ),
    Attack(
        "template named a path, at the way out",
        lambda ground: (ground.here / "out").mkdir(),
        lambda ground: ground.calls(
            lambda: write_templates(ground.here / "out", {"../../outside/evil": "pwned"})
        ),
        TEMPLATE,
    ),
    Attack(
        "template file that is a link",
        lambda ground: [
            (ground.here / "out").mkdir(),
            (ground.here / "out" / "chat_template.jinja").symlink_to(ground.outside / "file"),
        ],
        lambda ground: ground.calls(
            lambda: write_templates(ground.here / "out", {"default": "pwned"})
        ),
        "is a link, and nothing is written through one",
    ),
    Attack(
        "shard outside of the model",
        other_shard,
        lambda ground: ground.train(),
        "index.json names a file '../outside/file', and it is a path",
        then=nothing_in("outputs"),
    ),
    Attack(
        "manifest's file outside of the checkpoint",
        other_hf_file,
        lambda ground: ground.torchprime("export", ground.checkpoint(), "--out", "out"),
        r"manifest.json names a file 'hf/\.\./.*', and it leads out of the folder",
        then=nothing_in("out"),
    ),
    Attack(
        "shard's place outside of the checkpoint",
        place_of_a_shard,
        lambda ground: ground.torchprime("export", ground.checkpoint(), "--out", "out"),
        r"\.metadata names a file '\.\./.*', and it leads out of the folder",
        then=nothing_in("out"),
    ),
    *(
        Attack(
            f"run named {name!r}",
            lambda ground: None,
            lambda ground, name=name: ground.train(f"run_name='{name}'", "dry_run=true"),
            f"run_name: given .*{fault}",
        )
        for name, fault in (
            ("../outside", "it is a path"),
            ("..", "it is not a file name"),
            ("a\x1b[2Jb", "it holds control characters"),
            ("a\u202eb", "it holds control characters or text-direction marks"),
            ("a" * 300, "it has more than 255 bytes"),
        )
    ),
    Attack(
        "card with code in every field",
        evil_facts,
        lambda ground: ground.torchprime(
            "export", ground.checkpoint(), "--out", "out", "--dtype", "bf16"
        ),
        "exported step_00000002 to out",
        code=0,
        then=card_is_harmless,
    ),
    Attack(
        "page template that runs code", hostile_page, render_it, "access to attribute .* is unsafe"
    ),
]
