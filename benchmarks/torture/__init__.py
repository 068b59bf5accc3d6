"""Commands that are killed, starved and fed with damage, thousands of times: `python -m torture`."""
