"""Latency, throughput and memory of fused networks."""
