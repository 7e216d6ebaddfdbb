vcl 4.1;

# Varnish as a cache in front of Afterimage, for Varnish 7:
#
#   varnishd -F -a :8080 -f "$PWD/config/varnish.vcl" -s malloc,1g -p http_gzip_support=off
#
# tests/it/fronts.rs runs this very file, with another port. Nothing has to be purged: a new image has a new address
# (?v=), and the plain one is revalidated when it is no longer fresh.
#
# http_gzip_support is on by default: Varnish then asks for gzip on behalf of every client, keeps only that, and unpacks
# it for clients that don't accept it. Browsers would get no brotli, and an unpacked image a weak ETag that isn't
# Afterimage's. Afterimage compresses SVG itself, and Vary keeps the codings apart.

import std;

backend default {
    .host = "127.0.0.1";
    .port = "8000";
    .connect_timeout = 1s;
    # Longer than [redis] response_timeout, so that Afterimage gives up first.
    .first_byte_timeout = 10s;
    .between_bytes_timeout = 10s;
    .probe = {
        # Not /readyz: that fails without Redis, while Afterimage still serves the images in its memory. With [admin] listen, as in
        # the container, /healthz isn't here: take /openapi.json.
        .url = "/healthz";
        .interval = 2s;
        .timeout = 1s;
        .window = 4;
        .threshold = 2;
        # Counts as healthy before the first probe.
        .initial = 2;
    }
}

sub vcl_recv {
    # Only images are public. /metrics, /readyz and /healthz are not.
    if (req.url !~ "^/((images|placeholders)/|events\?)") {
        return (synth(404));
    }
    # Writes don't pass here: they go to Afterimage itself, with a token. OPTIONS is for scripts of other origins.
    if (req.method !~ "^(GET|HEAD|OPTIONS)$") {
        return (synth(405));
    }

    # Images are the same for every client.
    unset req.http.Cookie;
    unset req.http.Authorization;

    # Streams of events are passed on as they come. Only by ids: a prefix shows what there is to whoever asks. A request with both,
    # however it is written, is 400.
    if (req.url ~ "^/events\?") {
        if (req.url !~ "[?&]ids=") {
            return (synth(403));
        }
        return (pass);
    }

    # The request has the same id in both logs.
    if (!req.http.X-Request-Id) {
        set req.http.X-Request-Id = req.xid;
    }

    # At most three copies of an image that varies by coding, instead of one for each way to write the list.
    # A coding with q=0 is refused.
    unset req.http.X-Coding;
    if (req.http.Accept-Encoding ~ "(?i)(^|[,\s])br\s*(,|$|;\s*q=(1|0\.0*[1-9]))") {
        set req.http.X-Coding = "br";
    }
    if (req.http.Accept-Encoding ~ "(?i)(^|[,\s])gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))") {
        set req.http.X-Coding = req.http.X-Coding + ",gzip";
    }
    unset req.http.Accept-Encoding;
    if (req.http.X-Coding) {
        set req.http.Accept-Encoding = regsub(req.http.X-Coding, "^,", "");
        unset req.http.X-Coding;
    }

    # While Afterimage answers, a copy is used for ten seconds after it is no longer fresh, and revalidated meanwhile.
    # While it doesn't, a copy is used for as long as there is one.
    if (std.healthy(req.backend_hint) && req.restarts == 0) {
        set req.grace = 10s;
    } else {
        set req.grace = 2h;
    }
}

sub vcl_backend_fetch {
    if (bereq.url ~ "^/events\?") {
        # Longer than [events] heartbeat.
        set bereq.between_bytes_timeout = 60s;
    }
}

sub vcl_backend_response {
    # Varnish revalidates an old copy with If-None-Match, and drops the copy when any answer comes. The copy is better
    # than an error, so the error is dropped.
    if (beresp.status >= 500 && bereq.http.If-None-Match && !bereq.uncacheable) {
        return (abandon);
    }
    # Images outlive Afterimage for as long as records live by default ([records] ttl).
    set beresp.grace = 2h;

    # While Redis can't be reached, Afterimage answers with Age. Varnish counts it, and nothing would be left of
    # max-age=5; but these seconds count from now on.
    if (beresp.http.Age && beresp.http.Cache-Control == "public, max-age=5") {
        set beresp.ttl = 5s;
    }
}

sub vcl_backend_error {
    if (bereq.http.If-None-Match && !bereq.uncacheable) {
        return (abandon);
    }
}

sub vcl_synth {
    if (resp.status == 1200) {
        set resp.status = 200;
        set resp.http.Content-Type = "text/event-stream";
        set resp.http.Cache-Control = "no-cache, no-transform";
        # Without it a page of another origin would count this as an error. It says nothing about anybody.
        set resp.http.Access-Control-Allow-Origin = "*";
        synthetic({"retry: 2000
: Afterimage takes no stream now

"});
        return (deliver);
    }
    # An error was dropped above. This time the old copy is used, however old it is.
    if (resp.status == 503 && req.restarts == 0) {
        return (restart);
    }
    if (resp.status == 405) {
        set resp.http.Allow = "GET, HEAD, OPTIONS";
    }
}

sub vcl_deliver {
    # A browser's EventSource never comes back after an error. While Afterimage restarts, or has no place for another stream,
    # it gets a stream that ends at once.
    if (req.url ~ "^/events\?" && req.http.Accept ~ "text/event-stream"
        && resp.status >= 502 && resp.status <= 504) {
        return (synth(1200));
    }

    # Where the answer came from (RFC 9211 §2). A copy that is no longer fresh has a ttl below zero.
    if (resp.http.Cache-Status) {
        std.collect(resp.http.Cache-Status);
        set resp.http.Cache-Status = resp.http.Cache-Status + ", ";
    }
    if (obj.hits > 0) {
        set resp.http.Cache-Status = resp.http.Cache-Status + "varnish; hit; ttl="
            + std.integer(duration = obj.ttl);
        # The store's time says nothing about an answer that Varnish had.
        unset resp.http.Server-Timing;
    } else {
        set resp.http.Cache-Status = resp.http.Cache-Status + "varnish; fwd=miss";
    }
    # It belongs to one request, not to copies of its answer.
    set resp.http.X-Request-Id = req.http.X-Request-Id;
    unset resp.http.X-Varnish;
}
