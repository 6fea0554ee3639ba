"""The main job on real text: train, record, report, mask, anneal, decompose and route, through the public interface."""
