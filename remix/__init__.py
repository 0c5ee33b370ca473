"""The music and the flow: values, signal processing, stages. No model runtime, no transport."""
