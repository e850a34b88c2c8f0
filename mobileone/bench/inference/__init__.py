"""Latency, throughput, memory and operations of fused networks."""
