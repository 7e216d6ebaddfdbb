"""An example backend: it makes three images for a prompt and stores each in Redis.

    pip install fastapi uvicorn redis pillow
    REDIS_URL=redis://127.0.0.1:6379 afterimage --http-cors-origins '["http://localhost:8001"]'
    uvicorn main:app --app-dir examples/backend --port 8001

Then open http://localhost:8001. The page follows its images with Afterimage's /events, which Redis feeds: the backend only
stores images, a rough one first.
"""

import base64
import colorsys
import io
import json
import math
import os
import pathlib
import random
import time
import uuid

import redis
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import HTMLResponse
from PIL import Image, ImageDraw, ImageFilter

IMAGES = os.environ.get("IMAGES_URL", "http://localhost:8000")
SECONDS = float(os.environ.get("SECONDS_PER_STEP", "0.6"))
PAGE = pathlib.Path(__file__).with_name("index.html").read_text()

app = FastAPI()
store = redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"))
progress: dict[str, dict] = {}


def draw(prompt: str, number: int, steps: int) -> bytes:
    """Draws rings of light. More steps give more and sharper rings, as a model would."""
    chance = random.Random(f"{prompt} {number}")
    picture = Image.new("RGB", (512, 512), (14, 15, 24))
    for _ in range(3 * steps):
        colour = tuple(int(255 * it) for it in colorsys.hsv_to_rgb(chance.random(), 0.75, 1))
        radius, angle = chance.randint(30, 150), chance.random() * math.tau
        x, y = 256 + 110 * math.cos(angle), 256 + 110 * math.sin(angle)
        ring = ImageDraw.Draw(picture)
        ring.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=9)
    picture = picture.filter(ImageFilter.GaussianBlur(12 / steps))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def generate(job: str, prompt: str, ids: list[str]) -> None:
    for number, image_id in enumerate(ids):
        for steps in (1, 4):
            time.sleep(SECONDS)
            image = base64.b64encode(draw(prompt, number, steps)).decode()
            record = {"base64_data": image, "mime_type": "image/png", "created_at": time.time(), "prompt": prompt}
            store.set(f"image:{image_id}", json.dumps(record), ex=7200)
        progress[job]["done"] += 1


@app.post("/concepts", status_code=202)
def concepts(prompt: str, background: BackgroundTasks) -> dict:
    job = uuid.uuid4().hex[:8]
    ids = [f"concept_{job}_{number}" for number in range(3)]
    progress[job] = {"done": 0, "of": len(ids)}
    background.add_task(generate, job, prompt, ids)
    return {"job": job, "ids": ids}


@app.get("/concepts/{job}")
def state(job: str) -> dict:
    return progress.get(job, {})


@app.get("/", response_class=HTMLResponse)
def page() -> str:
    return PAGE.replace("{{IMAGES_URL}}", IMAGES)
