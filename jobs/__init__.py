"""Durable jobs, who may have them, and when: between the flow and the transports."""
