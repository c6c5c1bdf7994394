"""The language that passes and backends share: specs and weight references."""
