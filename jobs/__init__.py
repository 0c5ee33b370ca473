"""Durable jobs and the stage cache: between the flow and the transports."""
