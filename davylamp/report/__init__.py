"""One HTML file that a person can read and send: `html.write_report`."""
