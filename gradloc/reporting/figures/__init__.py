"""Charts of a report, by what they are about; `drawing` makes the SVG."""
