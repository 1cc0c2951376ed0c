"""The report of a run: `report.json` for machines, one self-contained `report.html` for people."""
