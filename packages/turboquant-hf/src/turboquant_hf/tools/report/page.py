"""The page: one file that needs nothing from elsewhere."""

import json
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from turboquant_hf.tools.caches import UNCOMPRESSED
from turboquant_hf.tools.eval.summary import GOOD_KL, RunSummary
from turboquant_hf.tools.report.charts import error_by_layer, families, kl_against_bytes, speed_against_bytes
from turboquant_hf.tools.report.svg import marker

MARKER = '<meta name="generator" content="turboquant report">'


def render_page(summaries: Sequence[RunSummary]) -> str:
    """HTML with a section for each run."""
    environment = Environment(
        loader=PackageLoader("turboquant_hf.tools.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["depth"] = lambda depth: f"{depth:.0%}"
    page = environment.get_template("page.html.j2").render(
        summaries=summaries,
        marker_of_the_command=Markup(MARKER),
        style=Markup((files(__package__) / "page.css").read_text(encoding="utf-8")),
        uncompressed=UNCOMPRESSED,
        good_kl=GOOD_KL,
        marker=marker,
        families=families,
        kl_against_bytes=kl_against_bytes,
        speed_against_bytes=speed_against_bytes,
        error_by_layer=error_by_layer,
        pretty=lambda data: json.dumps(data, indent=1),
    )
    return page + "\n"
