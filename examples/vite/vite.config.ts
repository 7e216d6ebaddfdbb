import react from "@vitejs/plugin-react";
import { defineConfig, loadEnv, type ProxyOptions } from "vite";

/** Addresses that pages read. Events only by ids: whoever follows a prefix is told every id that begins with it. */
const readable = /^\/(images|placeholders)\/|^\/events\?(.*&)?ids=/;

/**
 * Passes on what pages read, and nothing else. Every site that is open in your browser can send requests to the development
 * server, and with `--host` so can everybody in your network; whatever passes here reaches Afterimage. Therefore:
 *
 * - Only GET and HEAD pass. Pages never write; backends write to Afterimage itself.
 * - Cookies and tokens don't pass. A browser sends the cookie of Afterimage's gallery to every port of its host, so a request
 *   from any page here would have the rights of whoever is signed in there.
 * - Afterimage gets its own `Host` (`changeOrigin`), not one that a page chose. Vite refuses names that it doesn't know.
 */
function reads(target: string): ProxyOptions {
  return {
    target,
    changeOrigin: true,
    bypass(request, response) {
      delete request.headers.cookie;
      delete request.headers.authorization;
      if (request.method !== "GET" && request.method !== "HEAD") {
        response?.writeHead(405, { Allow: "GET, HEAD" }).end();
        return request.url;
      }
      if (!readable.test(request.url ?? "")) return false; // 404
    },
  };
}

export default defineConfig(({ mode }) => {
  const afterimage = loadEnv(mode, ".", "AFTERIMAGE_").AFTERIMAGE_URL ?? "http://127.0.0.1:8000";
  const proxy = { "^/(images|placeholders|events)(/|\\?|$)": reads(afterimage) };
  return {
    plugins: [react()],
    // afterimage-web is a link to a folder outside of this one. It must use this React.
    resolve: { dedupe: ["react", "react-dom"] },
    server: { proxy },
    preview: { proxy },
  };
});
