// JSX-like templates without a build step. Every value becomes a text node or a property, never markup.
import htm from "./vendor/htm.mjs";
import { h } from "./vendor/preact.mjs";

export const html = htm.bind(h);
