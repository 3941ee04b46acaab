"""vl-convert: the page template that lets `dvc plots show` draw without a network."""

from __future__ import annotations

from pathlib import Path

from closedloop.files import write_text

TEMPLATE_FILE = Path(".dvc/plots_template.html")
VEGA_LITE = "v5.21"  # DVC's plot templates are written for Vega-Lite 5; the bundle brings the Vega that fits
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>Plots</title>
<style>
body { font-family: sans-serif; display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; padding: 1rem; }
img { max-width: 40rem; }
</style>
<script>
%s
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write_template(path: Path) -> None:
    """Write DVC's HTML template with Vega inside; DVC's own loads it from a CDN, and stays blank offline."""
    import vl_convert

    script = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]  # the default snippet fits
    # the page ends a script at this text wherever it stands, a string in the code included
    write_text(path, PAGE.replace("%s", script.replace("</script", "<\\/script")))
