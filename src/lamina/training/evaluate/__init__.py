"""What base and stages are judged by: evals, gates, drift, and what they write."""
