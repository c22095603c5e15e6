"""The report as one HTML page: inline SVG and CSS, no script, nothing fetched.

Reads from 360 pixels up, light and dark. It holds no date, so that the same document gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvmdp.bench.report.figure import Figure, Table, Value
from kvmdp.bench.report.results import Results, latency_name, vcpus_name
from kvmdp.bench.report.scale import duration, memory, number
from kvmdp.bench.report.svg import STYLE, attribute, text_content

_CSS = """\
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1340px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3em}
h2{font-size:1.25rem;margin:2.2em 0 .5em;padding-top:.6em;border-top:1px solid var(--rule)}
p,figcaption,.claims li,.missing li{max-width:72ch}
p{margin:.5em 0}
a{color:var(--s0)}
.soft,figcaption{color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1.2em;margin:.6em 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
ul.plain{list-style:none;padding:0}
.claims li{margin:0 0 1em;padding-left:.9em;border-left:4px solid var(--soft)}
.claims .supported{border-left-style:solid;border-color:var(--s2)}
.claims .weakened{border-left-style:double;border-left-width:6px;border-color:var(--s1)}
.claims .undecided{border-left-style:dashed}
.verdict{font-weight:600}
.notice{border:2px solid var(--s1);padding:.5em .9em}
figure{margin:0}
figure>p{margin:.6em 0 0}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));gap:12px;margin:.8em 0}
.chart{display:block;width:100%;max-width:560px;height:auto}
.scroll{overflow-x:auto;margin:.6em 0}
.scroll.long{max-height:34rem}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.25em .7em;text-align:right;vertical-align:bottom;border-bottom:1px solid var(--rule)}
th{font-weight:600}
tbody th,td.text,th.text{text-align:left}
tbody th,td{white-space:nowrap}
thead th{background:var(--panel)}
.scroll.long thead th{position:sticky;top:0}
tbody tr:nth-child(even){background:var(--panel)}
.group th{padding-top:1.1em;background:var(--ground);color:var(--soft)}
summary{cursor:pointer}
.files{font-size:.82rem}
@media (max-width:520px){dl{display:block}dd{margin:0 0 .5em}}
@media print{.scroll,.scroll.long{overflow:visible;max-height:none}}
"""

_METHOD = (
    "The contenders of one number of vCPUs and one latency took turns, round after round, after warm-up rounds that "
    "do not count. Ratios are of rounds next to each other, and of those the median, minimum and maximum: they carry "
    "over to another machine, the plain figures do not."
)

_FLOOR = (
    "The floor is the cost of a bare fault exit, measured in the same run by entering KVM_RUN again and again on a "
    "fault left unresolved. A trap's own cost is its time a page less the floor. present is the same work with all "
    "memory in place: nothing can be faster."
)

_CLAIMS = (
    "What David Matlack's RFC and Peter Xu's reply to it (kvm list, November 2023) say, in short, and whether these "
    "figures bear it out on this host."
)

_OVERVIEW = (
    "Medians of the rounds. x uffd is the median of the ratios to userfaultfd with one reader, round by round; a dash "
    "is what was not measured."
)

_TEXT = ' class="text"'  # of a cell that holds words
_OPEN_ROWS = 12  # a longer table is folded away at first

_VERDICTS = {
    "supported": "These figures support it.",
    "weakened": "These figures weaken it.",
    "undecided": "These figures cannot decide it.",
}


def page(results: Results, figures: Sequence[Figure]) -> str:
    """Return the whole page. `figures` name the SVG and CSV files that lie beside it."""
    title = "KVM exits or userfaultfd: a comparison" if results.contenders else "Traced runs of demand paging"
    version = text_content(f"kvmdp {results.document['version']}".strip())
    source = f'{version}. Data: <a href="compare.json">compare.json</a>.'
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{text_content(title)}</title>",
        f"<style>\n{STYLE}{_CSS}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<header>\n<h1>{text_content(title)}</h1>",
        f'<p class="soft">{source}</p>',
        *_notice(results),
        "</header>",
        *_host(results),
        *_work(results),
        *_overview(results),
        *_claims(results),
        *_missing(results),
        *(line for figure in figures for line in _figure(figure)),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _notice(results: Results) -> list[str]:
    if results.document["complete"]:
        return []
    link = '<a href="#missing">what is missing</a>'
    return [
        f'<p class="notice"><strong>Partial.</strong> The comparison was ended early; {link} is said below.</p>'
    ]


def _host(results: Results) -> list[str]:
    host = results.host
    if not host:
        return []
    facts = {
        "CPU": f"{host['cpu']}, {host['cpus']} CPUs",
        "Memory": memory(host["memory_bytes"] >> 10),
        "Kernel": host["kernel"],
        "KVM": f"{host['kvm']}, "
        + ("nested paging (TDP)" if host["nested_paging"] else "shadow paging (no TDP)"),
        "Transparent huge pages": f"{host['thp']}, shmem {host['thp_shmem']}",
        "Python": host["python"],
    }
    return ['<h2 id="host">Host</h2>', *_facts(facts)]


def _work(results: Results) -> list[str]:
    """Say what was measured and how, from the options of the benches."""
    benches = results.document["benches"]
    if not benches:
        return []
    options = benches[0]["options"]
    size = "; ".join(_sizes(results))
    share = "every vCPU touches all of it" if options["overlap"] else "each vCPU touches its share"
    access = "write" if options["write"] else "read"
    bandwidth = options["bandwidth"]
    facts = {
        "Guest memory": f"{size}; {share}; backing {options['backing']}",
        "Work": f"{options['workload']}, {options['order']}, by {access}, in ring {options['ring']}",
        "Fetched a fault": "1 page" if options["fault_around"] == 1 else f"{options['fault_around']} pages",
        "vCPUs": ", ".join(map(str, results.vcpus)),
        "Simulated network": ", ".join(duration(1e6 * each) if each else "none" for each in results.latencies)
        + (f"; {bandwidth * 8 / 1e9:g} Gbit a second" if bandwidth else "; bandwidth not limited"),
        "Rounds": str(options["rounds"]),
    }
    words = [f"<p>{text_content(each)}</p>" for each in (_METHOD, _FLOOR)]
    return ['<h2 id="work">What was measured, and how</h2>', *_facts(facts), *words]


def _sizes(results: Results) -> list[str]:
    """Say how much RAM a vCPU has; places with a long latency may have less."""
    found: dict[int, dict[float, None]] = {}
    for bench in results.document["benches"]:
        options = bench["options"]
        found.setdefault(options["bytes_per_vcpu"], {})[float(options["latency"])] = None
    if len(found) == 1:
        return [f"{memory(size / 1024)} a vCPU" for size in found]
    return [
        f"{memory(size / 1024)} a vCPU with {', '.join(map(latency_name, latencies))}"
        for size, latencies in found.items()
    ]


def _facts(facts: dict[str, str]) -> list[str]:
    rows = (f"<dt>{text_content(name)}</dt><dd>{text_content(value)}</dd>" for name, value in facts.items())
    return ["<dl>", *rows, "</dl>"]


def _overview(results: Results) -> list[str]:
    """Return rates and ratios of all contenders in one table: what the terminal shows."""
    if not results.contenders:
        return []
    counts = "".join(f'<th scope="colgroup" colspan="2">{vcpus_name(vcpus)}</th>' for vcpus in results.vcpus)
    columns = '<th scope="col">pages/s</th><th scope="col">x uffd</th>' * len(results.vcpus)
    lines = [
        '<h2 id="overview">Pages a second, and the ratio to userfaultfd</h2>',
        f"<p>{text_content(_OVERVIEW)}</p>",
        '<div class="scroll" tabindex="0" role="region" aria-label="Overview"><table>',
        f'<thead><tr><th scope="col" rowspan="2" class="text">contender</th>{counts}</tr><tr>{columns}</tr></thead>',
    ]
    for latency in results.latencies:
        heading = text_content(latency_name(latency))
        span = 1 + 2 * len(results.vcpus)
        lines += ["<tbody>", f'<tr class="group"><th scope="rowgroup" colspan="{span}">{heading}</th></tr>']
        for name in results.contenders:
            cells = "".join(_overview_cell(results, name, vcpus, latency) for vcpus in results.vcpus)
            lines.append(f'<tr><th scope="row">{text_content(name)}</th>{cells}</tr>')
        lines.append("</tbody>")
    return [*lines, "</table></div>"]


def _overview_cell(results: Results, name: str, vcpus: int, latency: float) -> str:
    entry, ratio = results.entry(name, vcpus, latency), results.ratio(name, vcpus, latency)
    rate = f"{entry['pages_per_second']['median']:,.0f}" if entry else "-"
    return f"<td>{rate}</td><td>{ratio['median']:.2f}</td>" if ratio else f"<td>{rate}</td><td>-</td>"


def _claims(results: Results) -> list[str]:
    if not results.document["claims"]:
        return []
    items = [
        f"<li class={attribute(each['verdict'])}><p>{text_content(each['who'])}: {text_content(each['claim'])}</p>\n"
        f'<p><span class="verdict">{_VERDICTS[each["verdict"]]}</span> {text_content(each["why"])}</p></li>'
        for each in results.document["claims"]
    ]
    return [
        '<h2 id="claims">The claims of the RFC and of the reply</h2>',
        f"<p>{text_content(_CLAIMS)}</p>",
        '<ul class="plain claims">',
        *items,
        "</ul>",
    ]


def _missing(results: Results) -> list[str]:
    lines = results.missing()
    if not lines and not results.contenders:
        return []
    words = [f"<li>{text_content(line)}</li>" for line in lines]
    inner = ["<ul>", *words, "</ul>"] if lines else ["<p>Nothing: all that was planned was measured.</p>"]
    return ['<h2 id="missing">What is missing</h2>', '<div class="missing">', *inner, "</div>"]


def _figure(figure: Figure) -> list[str]:
    names = [*(f"{panel.name}.svg" for panel in figure.panels), f"{figure.name}.csv"]
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in names)
    rows = len(figure.table.rows)
    return [
        f'<h2 id="{figure.name}">{text_content(figure.title)}</h2>',
        "<figure>",
        '<div class="panels">',
        *(panel.render(standalone=False) for panel in figure.panels),
        "</div>",
        f"<figcaption>{text_content(figure.caption)}</figcaption>",
        *(f"<p>{text_content(line)}</p>" for line in figure.missing),
        f"<details{' open' if rows <= _OPEN_ROWS else ''}><summary>The numbers, {rows} rows</summary>",
        *_table(figure.table, figure.title),
        "</details>",
        f'<p class="files">{links}</p>',
        "</figure>",
    ]


def _table(table: Table, name: str) -> Iterable[str]:
    """Return a table that scrolls by itself where it is wider than the page."""
    texts = [any(isinstance(row[column], str) for row in table.rows) for column in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{_TEXT if text else ""}>{text_content(title)}</th>'
        for title, text in zip(table.header, texts, strict=True)
    )
    yield f'<div class="scroll long" tabindex="0" role="region" aria-label={attribute("Numbers: " + name)}><table>'
    yield f"<thead><tr>{head}</tr></thead>"
    yield "<tbody>"
    heading = texts.index(True) if True in texts else 0
    for row in table.rows:
        cells = (_cell(value, column == heading) for column, value in enumerate(row))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _cell(value: Value, heading: bool) -> str:
    text = "-" if value is None else value if isinstance(value, str) else number(value)
    if heading:
        return f'<th scope="row">{text_content(text)}</th>'
    return f"<td{_TEXT if isinstance(value, str) else ''}>{text_content(text)}</td>"
