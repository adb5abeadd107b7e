// Parses a server-sent event stream (WHATWG HTML, "Interpreting an event stream"). EventSource itself cannot send an
// Authorization header, so the stream is read with fetch and taken apart here. Knows nothing of what events mean.

/** Returns `push(text)`, which takes the next piece of the stream and returns the events it completes: {event, data}. */
export function eventParser() {
  let pieces = []; // of a line whose end has not come; a snapshot is one line of megabytes in hundreds of pieces
  let endsInCr = false;
  let event = "";
  let data = [];

  function line(text, out) {
    if (text === "") {
      if (data.length) out.push({ event: event || "message", data: data.join("\n") });
      event = "";
      data = [];
      return;
    }
    const colon = text.indexOf(":");
    if (colon === 0) return; // a comment: the keep-alive
    const field = colon < 0 ? text : text.slice(0, colon);
    const value = colon < 0 ? "" : text.slice(text[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "event") event = value;
    else if (field === "data") data.push(value);
  }

  return function push(text) {
    const out = [];
    if (!endsInCr && !/[\r\n]/.test(text)) {
      pieces.push(text);
      return out;
    }
    pieces.push(text);
    // A CR at the very end may be the first half of a CRLF: it waits for the next piece, or one line would become two.
    const lines = pieces.join("").split(/\r\n|\n|\r(?!$)/);
    pieces = [lines.pop()];
    endsInCr = pieces[0].endsWith("\r");
    for (const each of lines) line(each, out);
    return out;
  };
}
