// Stream an answer from the HTTP port with OpenAI's client.
// npm install && node openai.mjs "Why is the sky blue?" [http://host:port/v1]
import OpenAI from "openai";

const [question, baseURL = "http://127.0.0.1:8000/v1"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });

const stream = await client.chat.completions.create({
  model: "", // the one that is served
  messages: [{ role: "user", content: question }],
  max_tokens: 100,
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");
console.log();
