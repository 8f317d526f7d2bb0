"""Pictures and the HTML report from a run folder."""
