"""`lynceus search policy MODEL DATA`: a smaller network found from a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._models import open_model
from lynceus.cli._run import Code, call, run_folder, show
from lynceus.cli._schema import one_of, parse, real, with_options
from lynceus.core.errors import AdviceError

SEARCHES: dict[str, tuple[str, str]] = {
    "policy": (
        "lynceus.search.policy.compress:PolicyConfig",
        "N2N: policies remove layers of a trained network and shrink the others; the student learns from it",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Searches a smaller network around a trained one, teaches it, and saves it like a trained model."""

    model: Positional[str]  # run folder of a trained convolutional classifier
    data: Positional[str]  # labelled images of its classes
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # use at most this many images
    remove_policy: Path | None = None  # a removal policy of an earlier search to start from
    shrink_policy: Path | None = None  # a shrinkage policy of an earlier search to start from
    out: Path | None = None  # folder; students found there are not taught again; default: runs/search/policy


def main(argv: Sequence[str]) -> int:
    name, rest = one_of("search", SEARCHES, argv, usage="lynceus search NAME MODEL DATA [options]")
    if name is None:
        return 0
    schema = with_options(
        Options,
        search=SEARCHES[name][0],
        learning="lynceus.search.policy.reinforce:ReinforceConfig",
        distil="lynceus.search.policy.scoring:DistilConfig",
    )
    options = parse(schema, rest, prog=f"lynceus search {name}", description=SEARCHES[name][1])
    import lynceus.data
    from lynceus.cli.train import difference_of
    from lynceus.search.policy import compress, save_policy
    from lynceus.train.checkpoint import save_model

    config, learning, distil = real(options.search), real(options.learning), real(options.distil)
    model = open_model(options.model)
    data = lynceus.data.open(options.data, split=options.split, limit=options.limit)
    out = run_folder(options.out, "search", name, resume=options.out is not None)
    given = {"remove": options.remove_policy, "shrink": options.shrink_policy}
    policies = {stage: path for stage, path in given.items() if path is not None}
    try:
        made = compress(
            model, data, config=config, learning=learning, distil=distil, policies=policies, keep=out / "students"
        )
    except KeyboardInterrupt:
        more = f"the students taught so far are kept in {out}; the same command with --out {out} goes on"
        raise KeyboardInterrupt(f"interrupted; {more}.") from None
    except AdviceError:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    save_model(made.student, out)
    for stage, policy in made.policies.items():
        save_policy(policy, out / f"{stage}.safetensors")
    source = f"lynceus.data.open({options.data!r}, split={options.split!r}, limit={options.limit!r})"
    twin = (
        "import lynceus.data\nfrom lynceus.search.policy import DistilConfig, PolicyConfig, ReinforceConfig, compress\n"
        "from lynceus.train.checkpoint import load_model\n\nmade = "
        + call(
            "compress",
            Code(f"load_model({options.model!r})"),
            Code(source),
            config=Code(difference_of(config)),
            learning=Code(difference_of(learning)),
            distil=Code(difference_of(distil)),
            policies={k: str(v) for k, v in policies.items()} or None,
        )
        + "\nprint(made.report.table())"
    )
    show(made.report, out=out, twin=twin)
    print(
        f"\nthe student: {out}  (lynceus check accuracy {out} DATA); its policies: "
        + ", ".join(f"{s}.safetensors" for s in made.policies)
    )
    return 0
