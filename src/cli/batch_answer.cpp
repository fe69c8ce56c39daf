#include "cli/batch_answer.h"

#include <cmath>
#include <ctime>

#include "cli/json_out.h"

namespace krait {

namespace {

std::string_view finish_name(FinishReason reason) {
  return reason == FinishReason::length ? "length" : "stop";
}

/// -inf, which JSON has no number for, is null.
OrderedJson logprob_json(float logprob) {
  return std::isfinite(logprob) ? OrderedJson(short_double(logprob)) : OrderedJson();
}

OrderedJson usage_json(const BatchResult& r) {
  size_t generated = 0;
  for (const BatchChoice& c : r.choices) generated += c.ids.size();
  return {{"prompt_tokens", r.job.prompt.size()},
          {"completion_tokens", generated},
          {"total_tokens", r.job.prompt.size() + generated}};
}

std::string token_name(int32_t id, const AnswerStyle& style) {
  return style.tokenizer != nullptr ? style.tokenizer->token_bytes(id, false, true)
                                    : fmt::format("token_id:{}", id);
}

/// OpenAI's form for completions: parallel lists.
OrderedJson logprob_lists(const BatchChoice& c, const AnswerStyle& style) {
  OrderedJson tokens = OrderedJson::array();
  OrderedJson logprobs = OrderedJson::array();
  OrderedJson top = OrderedJson::array();
  for (const BatchToken& t : c.tokens) {
    tokens.push_back(token_name(t.id, style));
    logprobs.push_back(logprob_json(t.logprob));
    OrderedJson likeliest = OrderedJson::object();
    for (const TokenLogprob& l : t.top) {
      likeliest[token_name(l.id, style)] = logprob_json(l.logprob);
    }
    top.push_back(std::move(likeliest));
  }
  return {{"tokens", tokens}, {"token_logprobs", logprobs}, {"top_logprobs", top}};
}

/// OpenAI's form for chats, krait's for the rest: one object per token.
OrderedJson logprob_objects(const BatchChoice& c, const AnswerStyle& style, bool with_ids) {
  const auto object = [&](int32_t id, float logprob) {
    OrderedJson t = OrderedJson::object();
    if (with_ids) t["id"] = id;
    t["token"] = token_name(id, style);
    t["logprob"] = logprob_json(logprob);
    return t;
  };
  OrderedJson tokens = OrderedJson::array();
  for (const BatchToken& t : c.tokens) {
    OrderedJson token = object(t.id, t.logprob);
    token["top_logprobs"] = OrderedJson::array();
    for (const TokenLogprob& l : t.top) token["top_logprobs"].push_back(object(l.id, l.logprob));
    tokens.push_back(std::move(token));
  }
  return tokens;
}

OrderedJson openai_body(const Asked& asked, const BatchResult& r, const AnswerStyle& style) {
  OrderedJson body;
  body["id"] = fmt::format("{}-{}", asked.chat ? "chatcmpl" : "cmpl", asked.line);
  body["object"] = asked.chat ? "chat.completion" : "text_completion";
  body["created"] = static_cast<int64_t>(std::time(nullptr));
  body["model"] = asked.model.empty() ? style.model : asked.model;
  body["choices"] = OrderedJson::array();
  for (size_t k = 0; k < r.choices.size(); ++k) {
    const BatchChoice& c = r.choices[k];
    OrderedJson choice = {{"index", k}};
    if (asked.chat) {
      choice["message"] = {{"role", "assistant"}, {"content", c.text}};
    } else {
      choice["text"] = c.text;
    }
    if (style.print_ids || style.tokenizer == nullptr) choice["ids"] = c.ids;
    choice["logprobs"] = nullptr;
    if (r.job.n_logprobs >= 0) {
      choice["logprobs"] = asked.chat ? OrderedJson({{"content", logprob_objects(c, style, false)}})
                                      : logprob_lists(c, style);
    }
    choice["finish_reason"] = finish_name(c.finish);
    body["choices"].push_back(std::move(choice));
  }
  body["usage"] = usage_json(r);
  if (r.job.params.temperature > 0) body["seed"] = r.job.params.seed;
  return body;
}

OrderedJson simple_choice(const BatchChoice& c, const BatchResult& r, const AnswerStyle& style) {
  OrderedJson j = OrderedJson::object();
  if (style.tokenizer != nullptr) j["text"] = c.text;
  if (style.print_ids || style.tokenizer == nullptr) j["ids"] = c.ids;
  j["finish_reason"] = finish_name(c.finish);
  if (r.job.n_logprobs >= 0) j["logprobs"] = logprob_objects(c, style, true);
  return j;
}

OrderedJson simple_head(const Asked& asked) {
  OrderedJson j = {{"line", asked.line}};
  if (asked.has_id)
    j["id"] = asked.id_is_number ? OrderedJson::parse(asked.id) : OrderedJson(asked.id);
  return j;
}

OrderedJson score_json(const Asked& asked, const BatchResult& r, const AnswerStyle& style) {
  OrderedJson j = simple_head(asked);
  double sum = 0;
  bool greedy = true;
  OrderedJson tokens = OrderedJson::array();
  for (size_t i = 0; i < r.scores.size(); ++i) {
    const TokenScore& s = r.scores[i];
    const int32_t id = r.job.prompt[static_cast<size_t>(r.job.score_from) + i];
    sum += s.logprob;
    greedy = greedy && s.best == id;
    tokens.push_back({{"id", id},
                      {"token", token_name(id, style)},
                      {"logprob", logprob_json(s.logprob)},
                      {"is_greedy", s.best == id}});
  }
  j["logprob"] = std::isfinite(sum) ? OrderedJson(sum) : OrderedJson();
  j["is_greedy"] = greedy;
  j["tokens"] = std::move(tokens);
  j["usage"] = usage_json(r);
  return j;
}

}  // namespace

std::string answer_line(const Asked& asked, const BatchResult& r, const AnswerStyle& style) {
  const double seconds = to_thousandths(r.seconds);
  if (asked.format == BatchFormat::openai) {
    const std::string id = fmt::format("batch_req_{}", asked.line);
    return dump_json({{"id", id},
                      {"custom_id", asked.id},
                      {"response",
                       {{"status_code", 200},
                        {"request_id", id},
                        {"body", openai_body(asked, r, style)},
                        {"seconds", seconds}}},
                      {"error", nullptr}});
  }
  OrderedJson j;
  if (r.job.score_from > 0) {
    j = score_json(asked, r, style);
  } else {
    j = simple_head(asked);
    if (r.choices.size() == 1) {
      j.update(simple_choice(r.choices[0], r, style));
    } else {
      j["choices"] = OrderedJson::array();
      for (const BatchChoice& c : r.choices) j["choices"].push_back(simple_choice(c, r, style));
    }
    if (r.job.params.temperature > 0) j["seed"] = r.job.params.seed;
    j["usage"] = usage_json(r);
  }
  j["seconds"] = seconds;
  return dump_json(j);
}

std::string failure_line(const Asked& asked, const std::string& message) {
  if (asked.format == BatchFormat::openai) {
    return dump_json({{"id", fmt::format("batch_req_{}", asked.line)},
                      {"custom_id", asked.has_id ? OrderedJson(asked.id) : OrderedJson()},
                      {"response", nullptr},
                      {"error", {{"code", "invalid_request"}, {"message", message}}}});
  }
  OrderedJson j = simple_head(asked);
  j["error"] = message;
  return dump_json(j);
}

}  // namespace krait
