vcl 4.1;

backend default {
    .host = "{host}";
    .port = "{port}";
}

sub vcl_backend_response {
    # Nothing becomes stale during the measurement.
    set beresp.ttl = 1d;
}
