"""The report: figures (SVG), tables (CSV), one HTML page and the terminal's table, all from one JSON document."""
