"""vl-convert: the page template that lets `dvc plots show` draw without a network."""

from __future__ import annotations

from pathlib import Path

from closedloop.adapters.jinja import read_page
from closedloop.files import write_text

TEMPLATE_FILE = Path(".dvc/plots_template.html")
VEGA_LITE = "v5.21"  # DVC's plot templates are written for Vega-Lite 5; the bundle brings the Vega that fits


def write_template(path: Path) -> None:
    """Write DVC's HTML template with Vega inside; DVC's own loads it from a CDN, and stays blank offline."""
    import vl_convert

    script = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # the default snippet fits
    # the browser ends a script at this text, even inside a string of the code
    page = read_page("dvc_plots.html")
    write_text(path, page.replace("%s", script.replace("</script", "<\\/script")))
