import { AfterImage, useImage } from "afterimage-web/react";

const concepts = [
  { id: "hero_abc123", title: "Hero", alt: "A sun over dark hills" },
  { id: "logo_def456", title: "Logo", alt: "Rings of light around a centre" },
  { id: "photo_ghi789", title: "Photo", alt: "Lights of a street, out of focus" },
];

export function App() {
  return (
    <main>
      <header>
        <h1>Three concepts</h1>
        <p>
          Each appears when the backend has stored it, and again when the backend replaces it. Run <code>npm run images</code>.
        </p>
      </header>
      <section>
        {concepts.map((concept) => (
          <Concept key={concept.id} {...concept} />
        ))}
      </section>
    </main>
  );
}

function Concept({ id, title, alt }: { id: string; title: string; alt: string }) {
  return (
    <figure>
      <AfterImage id={id} alt={alt} width={1024} height={1024} sizes="(min-width: 54rem) 24rem, (min-width: 36rem) 50vw, 100vw" />
      <figcaption>
        <b>{title}</b> <Progress id={id} />
      </figcaption>
    </figure>
  );
}

/** The state of an image in words. Everything that follows images, in all tabs, shares one event stream. */
function Progress({ id }: { id: string }) {
  const image = useImage(id);
  let text = "being made …";
  if (image?.state === "present") {
    text = `version ${image.v.slice(0, 6)}`;
    if (image.bytes) text += ` · original ${(image.bytes / 1e6).toFixed(1)} MB`;
  }
  return <span role="status">{text}</span>;
}
