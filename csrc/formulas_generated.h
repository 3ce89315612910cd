// SPDX-License-Identifier: Apache-2.0
// Generated from sspo_ext/formulas/ by `python -m tools.generate_formulas`. Do not edit.
// clang-format off
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define SSPO_HD __host__ __device__
#else
#define SSPO_HD
#endif

namespace sspo {

template <class T> struct PairGrad { T loss, du_w, du_l; };
template <class T> struct PairScores { T u_w, u_l, n_w, n_l, margin, label; };

template <class T> SSPO_HD inline T exp_(T x) { using std::exp; return exp(x); }
template <class T> SSPO_HD inline T log_(T x) { using std::log; return log(x); }
template <class T> SSPO_HD inline T log1p_(T x) { using std::log1p; return log1p(x); }
template <class T> SSPO_HD inline T expm1_(T x) { using std::expm1; return expm1(x); }
template <class T> SSPO_HD inline T relu_(T x) { return x > T(0) || x != x ? x : T(0); }
template <class T> SSPO_HD inline T logsigmoid_(T x) {
  using std::exp; using std::fabs; using std::log1p;
  return (x < T(0) ? x : (x != x ? x : T(0))) - log1p(exp(-fabs(x)));
}
template <class T> SSPO_HD inline T sigmoid_(T x) {
  using std::exp;
  const T e = x < T(0) ? exp(x) : exp(-x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> sigmoid_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto sub_2 = mul_1 - mul_2;
  const auto mul_3 = -rsub;
  const auto log_sigmoid_backward = (mul_3 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_1)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto mul_5 = add * beta;
  const auto neg_4 = -mul_5;
  return {sub_2, mul_5, neg_4};
}

// max(0, 1 - z),  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> hinge_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto rsub = (T(1.0) - sub_1);
  const auto relu = relu_(rsub);
  const auto threshold_backward = ((relu <= T(0.0)) ? T(0.0) : T(1.0));
  const auto neg = -threshold_backward;
  const auto mul_1 = neg * beta;
  const auto neg_1 = -mul_1;
  return {relu, mul_1, neg_1};
}

// (u_w / n_w - u_l / n_l - margin / beta - 1 / (2 beta))^2
template <class T> SSPO_HD inline PairGrad<T> ipo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto div = u_w / n_w;
  const auto div_1 = u_l / n_l;
  const auto sub = div - div_1;
  const auto div_2 = margin / beta;
  const auto sub_1 = sub - div_2;
  const auto mul = (beta * T(2.0));
  const auto reciprocal = (T(1.0) / mul);
  const auto sub_2 = sub_1 - reciprocal;
  const auto pow_1 = sub_2 * sub_2;
  const auto mul_2 = (sub_2 * T(2.0));
  const auto neg = -mul_2;
  const auto div_3 = neg / n_l;
  const auto div_4 = mul_2 / n_w;
  return {pow_1, div_4, div_3};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (S_w / n_w - S_l / n_l) - simpo_gamma - margin
template <class T> SSPO_HD inline PairGrad<T> simpo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T simpo_gamma = o[1]; (void)simpo_gamma;
  const auto div = u_w / n_w;
  const auto div_1 = u_l / n_l;
  const auto sub = div - div_1;
  const auto mul = beta * sub;
  const auto sub_1 = mul - simpo_gamma;
  const auto sub_2 = sub_1 - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_2);
  const auto mul_1 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_2;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto sub_3 = mul_1 - mul_2;
  const auto mul_3 = -rsub;
  const auto log_sigmoid_backward = (mul_3 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_2)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto mul_5 = add * beta;
  const auto neg_4 = -mul_5;
  const auto div_2 = neg_4 / n_l;
  const auto div_3 = mul_5 / n_w;
  return {sub_3, div_3, div_2};
}

// (u_w - u_l - margin / beta - 1 / (2 beta))^2
template <class T> SSPO_HD inline PairGrad<T> ipo_sum_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = u_w - u_l;
  const auto div = margin / beta;
  const auto sub_1 = sub - div;
  const auto mul = (beta * T(2.0));
  const auto reciprocal = (T(1.0) / mul);
  const auto sub_2 = sub_1 - reciprocal;
  const auto pow_1 = sub_2 * sub_2;
  const auto mul_2 = (sub_2 * T(2.0));
  const auto neg = -mul_2;
  return {pow_1, mul_2, neg};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (u_w / n_w - u_l / n_l) - margin
template <class T> SSPO_HD inline PairGrad<T> sigmoid_norm_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto div = u_w / n_w;
  const auto div_1 = u_l / n_l;
  const auto sub = div - div_1;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto sub_2 = mul_1 - mul_2;
  const auto mul_3 = -rsub;
  const auto log_sigmoid_backward = (mul_3 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_1)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto mul_5 = add * beta;
  const auto neg_4 = -mul_5;
  const auto div_2 = neg_4 / n_l;
  const auto div_3 = mul_5 / n_w;
  return {sub_2, div_3, div_2};
}

// [-(1 - e) ls(z) + e ls(-z)] / (1 - 2 e),  e = label_smoothing,  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> robust_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto add = mul_1 + mul_2;
  const auto mul_3 = (label * T(2.0));
  const auto sub_2 = (mul_3 - T(1.0));
  const auto div = add / sub_2;
  const auto div_1 = (T(1.0) / sub_2);
  const auto mul_4 = div_1 * rsub;
  const auto log_sigmoid_backward = (mul_4 * sigmoid_((-neg_1)));
  const auto neg_2 = -log_sigmoid_backward;
  const auto mul_5 = div_1 * neg;
  const auto log_sigmoid_backward_1 = (mul_5 * sigmoid_((-sub_1)));
  const auto add_1 = neg_2 + log_sigmoid_backward_1;
  const auto mul_6 = add_1 * beta;
  const auto neg_3 = -mul_6;
  return {div, mul_6, neg_3};
}

// sig(z) [ls(z) - log q] + sig(-z) [ls(-z) - log(1 - q)],  q in [1e-6, 1 - 1e-6],  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> exo_pair_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto clamp = ((((label < T(1e-06)) ? T(1e-06) : label) > T(0.999999)) ? T(0.999999) : ((label < T(1e-06)) ? T(1e-06) : label));
  const auto sigmoid = sigmoid_(sub_1);
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto log = log_(clamp);
  const auto sub_2 = log_sigmoid_forward - log;
  const auto mul_1 = sigmoid * sub_2;
  const auto neg = -sub_1;
  const auto sigmoid_1 = sigmoid_(neg);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto neg_2 = -clamp;
  const auto log1p = log1p_(neg_2);
  const auto sub_3 = log_sigmoid_forward_1 - log1p;
  const auto mul_2 = sigmoid_1 * sub_3;
  const auto add = mul_1 + mul_2;
  const auto log_sigmoid_backward = (sigmoid_1 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto sigmoid_backward = (sub_3 * ((T(1.0) - sigmoid_1) * sigmoid_1));
  const auto neg_4 = -sigmoid_backward;
  const auto add_1 = neg_3 + neg_4;
  const auto log_sigmoid_backward_1 = (sigmoid * sigmoid_((-sub_1)));
  const auto add_2 = add_1 + log_sigmoid_backward_1;
  const auto sigmoid_backward_1 = (sub_2 * ((T(1.0) - sigmoid) * sigmoid));
  const auto add_3 = add_2 + sigmoid_backward_1;
  const auto mul_7 = add_3 * beta;
  const auto neg_5 = -mul_7;
  return {add, mul_7, neg_5};
}

// -(1 - sig(z / tau)) ls(z) + e^(ls(z / tau) - z),  tau = discopop_tau,  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> discopop_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T discopop_tau = o[1]; (void)discopop_tau;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto div = sub_1 / discopop_tau;
  const auto neg = -div;
  const auto sigmoid = sigmoid_(neg);
  const auto neg_1 = -sigmoid;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg_1 * log_sigmoid_forward;
  const auto log_sigmoid_forward_1 = logsigmoid_(div);
  const auto sub_2 = log_sigmoid_forward_1 - sub_1;
  const auto exp = exp_(sub_2);
  const auto add = mul_1 + exp;
  const auto neg_2 = -exp;
  const auto log_sigmoid_backward = (exp * sigmoid_((-div)));
  const auto log_sigmoid_backward_1 = (neg_1 * sigmoid_((-sub_1)));
  const auto add_1 = neg_2 + log_sigmoid_backward_1;
  const auto neg_3 = -log_sigmoid_forward;
  const auto sigmoid_backward = (neg_3 * ((T(1.0) - sigmoid) * sigmoid));
  const auto neg_4 = -sigmoid_backward;
  const auto add_2 = log_sigmoid_backward + neg_4;
  const auto div_1 = add_2 / discopop_tau;
  const auto add_3 = add_1 + div_1;
  const auto mul_5 = add_3 * beta;
  const auto neg_5 = -mul_5;
  return {add, mul_5, neg_5};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (e^-u_l - e^-u_w) - margin,  exponents at most 80
template <class T> SSPO_HD inline PairGrad<T> sigmoid_forward_kl_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -u_l;
  const auto clamp = ((neg > T(80.0)) ? T(80.0) : neg);
  const auto exp = exp_(clamp);
  const auto neg_1 = -u_w;
  const auto clamp_1 = ((neg_1 > T(80.0)) ? T(80.0) : neg_1);
  const auto exp_1 = exp_(clamp_1);
  const auto sub = exp - exp_1;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg_2 = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg_2 * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_3 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_3);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto sub_2 = mul_1 - mul_2;
  const auto mul_3 = -rsub;
  const auto log_sigmoid_backward = (mul_3 * sigmoid_((-neg_3)));
  const auto neg_5 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg_2 * sigmoid_((-sub_1)));
  const auto add = neg_5 + log_sigmoid_backward_1;
  const auto mul_5 = add * beta;
  const auto neg_6 = -mul_5;
  const auto mul_6 = neg_6 * exp_1;
  const auto le = (neg_1 <= T(80.0));
  const auto where = (le ? mul_6 : T(0.0));
  const auto neg_7 = -where;
  const auto mul_7 = mul_5 * exp;
  const auto le_1 = (neg <= T(80.0));
  const auto where_1 = (le_1 ? mul_7 : T(0.0));
  const auto neg_8 = -where_1;
  return {sub_2, neg_7, neg_8};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (ls(u_w) - ls(u_l)) - margin
template <class T> SSPO_HD inline PairGrad<T> sigmoid_js_divergence_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto log_sigmoid_forward = logsigmoid_(u_w);
  const auto log_sigmoid_forward_1 = logsigmoid_(u_l);
  const auto sub = log_sigmoid_forward - log_sigmoid_forward_1;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward_2 = logsigmoid_(sub_1);
  const auto mul_1 = neg * log_sigmoid_forward_2;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_3 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_3;
  const auto sub_2 = mul_1 - mul_2;
  const auto mul_3 = -rsub;
  const auto log_sigmoid_backward = (mul_3 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_1)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto mul_5 = add * beta;
  const auto neg_4 = -mul_5;
  const auto log_sigmoid_backward_2 = (neg_4 * sigmoid_((-u_l)));
  const auto log_sigmoid_backward_3 = (mul_5 * sigmoid_((-u_w)));
  return {sub_2, log_sigmoid_backward_3, log_sigmoid_backward_2};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta (e^((a - 1) u_w) - e^((a - 1) u_l)) / (a - 1) - margin,  a = f_alpha_divergence_coef,  exponents at most 80
template <class T> SSPO_HD inline PairGrad<T> sigmoid_alpha_divergence_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T f_alpha_divergence_coef = o[1]; (void)f_alpha_divergence_coef;
  const auto sub = (f_alpha_divergence_coef - T(1.0));
  const auto mul = sub * u_w;
  const auto clamp = ((mul > T(80.0)) ? T(80.0) : mul);
  const auto exp = exp_(clamp);
  const auto mul_1 = sub * u_l;
  const auto clamp_1 = ((mul_1 > T(80.0)) ? T(80.0) : mul_1);
  const auto exp_1 = exp_(clamp_1);
  const auto sub_1 = exp - exp_1;
  const auto div = sub_1 / sub;
  const auto mul_2 = beta * div;
  const auto sub_2 = mul_2 - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_2);
  const auto mul_3 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_2;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_4 = rsub * log_sigmoid_forward_1;
  const auto sub_3 = mul_3 - mul_4;
  const auto mul_5 = -rsub;
  const auto log_sigmoid_backward = (mul_5 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_2)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto mul_7 = add * beta;
  const auto div_1 = mul_7 / sub;
  const auto neg_4 = -div_1;
  const auto mul_8 = neg_4 * exp_1;
  const auto le = (mul_1 <= T(80.0));
  const auto where = (le ? mul_8 : T(0.0));
  const auto mul_9 = where * sub;
  const auto mul_10 = div_1 * exp;
  const auto le_1 = (mul <= T(80.0));
  const auto where_1 = (le_1 ? mul_10 : T(0.0));
  const auto mul_11 = where_1 * sub;
  return {sub_3, mul_11, mul_9};
}

// -q ls(z) - (1 - q) ls(-z),  z = beta u_w - beta_rejected u_l - margin
template <class T> SSPO_HD inline PairGrad<T> flex_dpo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T beta_rejected = o[1]; (void)beta_rejected;
  const auto mul = beta * u_w;
  const auto mul_1 = beta_rejected * u_l;
  const auto sub = mul - mul_1;
  const auto sub_1 = sub - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_2 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_3 = rsub * log_sigmoid_forward_1;
  const auto sub_2 = mul_2 - mul_3;
  const auto mul_4 = -rsub;
  const auto log_sigmoid_backward = (mul_4 * sigmoid_((-neg_1)));
  const auto neg_3 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_1)));
  const auto add = neg_3 + log_sigmoid_backward_1;
  const auto neg_4 = -add;
  const auto mul_6 = neg_4 * beta_rejected;
  const auto mul_7 = add * beta;
  return {sub_2, mul_7, mul_6};
}

// max(0, slic_delta - beta (S_w - S_l) + margin)
template <class T> SSPO_HD inline PairGrad<T> slic_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T slic_delta = o[1]; (void)slic_delta;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto sub_2 = slic_delta - sub_1;
  const auto relu = relu_(sub_2);
  const auto threshold_backward = ((relu <= T(0.0)) ? T(0.0) : T(1.0));
  const auto neg = -threshold_backward;
  const auto mul_1 = neg * beta;
  const auto neg_1 = -mul_1;
  return {relu, mul_1, neg_1};
}

// -ls(r_w) - ls(-r_w) / 2 - ls(-r_l) / 2,  r = beta u
template <class T> SSPO_HD inline PairGrad<T> nca_pair_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto mul = beta * u_w;
  const auto mul_1 = beta * u_l;
  const auto log_sigmoid_forward = logsigmoid_(mul);
  const auto neg = -log_sigmoid_forward;
  const auto neg_1 = -mul;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = (log_sigmoid_forward_1 * T(0.5));
  const auto sub = neg - mul_2;
  const auto neg_2 = -mul_1;
  const auto log_sigmoid_forward_2 = logsigmoid_(neg_2);
  const auto mul_3 = (log_sigmoid_forward_2 * T(0.5));
  const auto sub_1 = sub - mul_3;
  const auto log_sigmoid_backward = (T(-0.5) * sigmoid_((-neg_2)));
  const auto neg_4 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (T(-0.5) * sigmoid_((-neg_1)));
  const auto neg_6 = -log_sigmoid_backward_1;
  const auto log_sigmoid_backward_2 = (-sigmoid_((-mul)));
  const auto add = neg_6 + log_sigmoid_backward_2;
  const auto mul_6 = neg_4 * beta;
  const auto mul_7 = add * beta;
  return {sub_1, mul_7, mul_6};
}

// -ls(r_w - margin) - ls(margin - r_l),  r = beta u; margin is BCO's reward shift
template <class T> SSPO_HD inline PairGrad<T> bco_pair_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto mul = beta * u_w;
  const auto sub = mul - margin;
  const auto log_sigmoid_forward = logsigmoid_(sub);
  const auto neg = -log_sigmoid_forward;
  const auto mul_1 = beta * u_l;
  const auto sub_1 = margin - mul_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(sub_1);
  const auto sub_2 = neg - log_sigmoid_forward_1;
  const auto log_sigmoid_backward = (-sigmoid_((-sub_1)));
  const auto neg_2 = -log_sigmoid_backward;
  const auto mul_2 = neg_2 * beta;
  const auto log_sigmoid_backward_1 = (-sigmoid_((-sub)));
  const auto mul_3 = log_sigmoid_backward_1 * beta;
  return {sub_2, mul_3, mul_2};
}

// (u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2
template <class T> SSPO_HD inline PairGrad<T> sppo_hard_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto reciprocal = (T(1.0) / beta);
  const auto mul = (reciprocal * T(0.5));
  const auto sub = u_w - mul;
  const auto pow_1 = sub * sub;
  const auto reciprocal_1 = (T(1.0) / beta);
  const auto mul_1 = (reciprocal_1 * T(0.5));
  const auto add = u_l + mul_1;
  const auto pow_2 = add * add;
  const auto add_1 = pow_1 + pow_2;
  const auto mul_2 = (add * T(2.0));
  const auto mul_4 = (sub * T(2.0));
  return {add_1, mul_4, mul_2};
}

// (u_w - (q - 1/2) / beta)^2 + (u_l + (q - 1/2) / beta)^2
template <class T> SSPO_HD inline PairGrad<T> sppo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto sub = (label - T(0.5));
  const auto div = sub / beta;
  const auto sub_1 = u_w - div;
  const auto pow_1 = sub_1 * sub_1;
  const auto add = u_l + div;
  const auto pow_2 = add * add;
  const auto add_1 = pow_1 + pow_2;
  const auto mul = (add * T(2.0));
  const auto mul_2 = (sub_1 * T(2.0));
  return {add_1, mul_2, mul};
}

// 1 - sig(beta u_w) + sig(beta u_l)
template <class T> SSPO_HD inline PairGrad<T> apo_zero_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -beta;
  const auto mul = neg * u_w;
  const auto sigmoid = sigmoid_(mul);
  const auto mul_1 = beta * u_l;
  const auto sigmoid_1 = sigmoid_(mul_1);
  const auto add = sigmoid + sigmoid_1;
  const auto sigmoid_backward = ((T(1.0) - sigmoid_1) * sigmoid_1);
  const auto mul_2 = sigmoid_backward * beta;
  const auto sigmoid_backward_1 = ((T(1.0) - sigmoid) * sigmoid);
  const auto mul_3 = sigmoid_backward_1 * neg;
  return {add, mul_3, mul_2};
}

// sig(beta u_w) + 1 - sig(z),  z = beta (u_w - u_l) - margin
template <class T> SSPO_HD inline PairGrad<T> apo_down_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto mul = beta * u_w;
  const auto sigmoid = sigmoid_(mul);
  const auto sub = u_w - u_l;
  const auto mul_1 = beta * sub;
  const auto sub_1 = margin - mul_1;
  const auto sigmoid_1 = sigmoid_(sub_1);
  const auto add = sigmoid + sigmoid_1;
  const auto sigmoid_backward = ((T(1.0) - sigmoid_1) * sigmoid_1);
  const auto neg = -sigmoid_backward;
  const auto mul_2 = neg * beta;
  const auto neg_1 = -mul_2;
  const auto sigmoid_backward_1 = ((T(1.0) - sigmoid) * sigmoid);
  const auto mul_3 = sigmoid_backward_1 * beta;
  const auto add_1 = mul_2 + mul_3;
  return {add, add_1, neg_1};
}

// -S_w / nbar,  nbar = mean n_w over the batch's pairs: the mean over pairs is one over chosen tokens
template <class T> SSPO_HD inline PairGrad<T> sft_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -u_w;
  const auto div = neg / n_w;
  const auto div_1 = (T(1.0) / n_w);
  const auto neg_1 = -div_1;
  return {div, neg_1, T(0.0)};
}

// -S_w / n_w
template <class T> SSPO_HD inline PairGrad<T> nll_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -u_w;
  const auto div = neg / n_w;
  const auto div_1 = (T(1.0) / n_w);
  const auto neg_1 = -div_1;
  return {div, neg_1, T(0.0)};
}

// -S_l / n_l
template <class T> SSPO_HD inline PairGrad<T> nll_rejected_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -u_l;
  const auto div = neg / n_l;
  const auto div_1 = (T(1.0) / n_l);
  const auto neg_1 = -div_1;
  return {div, T(0.0), neg_1};
}

// -q ls(z) - (1 - q) ls(-z) - cpo_alpha S_w / n_w,  z = beta (S_w - S_l) - margin
template <class T> SSPO_HD inline PairGrad<T> cpo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const T cpo_alpha = o[1]; (void)cpo_alpha;
  const auto sub = u_w - u_l;
  const auto mul = beta * sub;
  const auto sub_1 = mul - margin;
  const auto neg = -label;
  const auto log_sigmoid_forward = logsigmoid_(sub_1);
  const auto mul_1 = neg * log_sigmoid_forward;
  const auto rsub = (T(1.0) - label);
  const auto neg_1 = -sub_1;
  const auto log_sigmoid_forward_1 = logsigmoid_(neg_1);
  const auto mul_2 = rsub * log_sigmoid_forward_1;
  const auto sub_2 = mul_1 - mul_2;
  const auto div = u_w / n_w;
  const auto mul_3 = cpo_alpha * div;
  const auto sub_3 = sub_2 - mul_3;
  const auto mul_4 = -cpo_alpha;
  const auto div_1 = mul_4 / n_w;
  const auto mul_5 = -rsub;
  const auto log_sigmoid_backward = (mul_5 * sigmoid_((-neg_1)));
  const auto neg_4 = -log_sigmoid_backward;
  const auto log_sigmoid_backward_1 = (neg * sigmoid_((-sub_1)));
  const auto add = neg_4 + log_sigmoid_backward_1;
  const auto mul_7 = add * beta;
  const auto neg_5 = -mul_7;
  const auto add_1 = div_1 + mul_7;
  return {sub_3, add_1, neg_5};
}

// -S_w / n_w - beta ls(lo_w - lo_l),  lo = m - log(1 - e^m),  m = min(S / n, -1e-6)
template <class T> SSPO_HD inline PairGrad<T> orpo_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto neg = -u_w;
  const auto div = neg / n_w;
  const auto div_1 = u_w / n_w;
  const auto clamp = ((div_1 > T(-1e-06)) ? T(-1e-06) : div_1);
  const auto gt = (clamp > T(-0.6931471805599453));
  const auto where = (gt ? clamp : T(-1.0));
  const auto where_1 = (gt ? T(-1.0) : clamp);
  const auto expm1 = expm1_(where);
  const auto neg_1 = -expm1;
  const auto log = log_(neg_1);
  const auto exp = exp_(where_1);
  const auto neg_2 = -exp;
  const auto log1p = log1p_(neg_2);
  const auto where_2 = gt ? log : log1p;
  const auto sub = clamp - where_2;
  const auto div_2 = u_l / n_l;
  const auto clamp_1 = ((div_2 > T(-1e-06)) ? T(-1e-06) : div_2);
  const auto gt_1 = (clamp_1 > T(-0.6931471805599453));
  const auto where_3 = (gt_1 ? clamp_1 : T(-1.0));
  const auto where_4 = (gt_1 ? T(-1.0) : clamp_1);
  const auto expm1_1 = expm1_(where_3);
  const auto neg_3 = -expm1_1;
  const auto log_1 = log_(neg_3);
  const auto exp_1 = exp_(where_4);
  const auto neg_4 = -exp_1;
  const auto log1p_1 = log1p_(neg_4);
  const auto where_5 = gt_1 ? log_1 : log1p_1;
  const auto sub_1 = clamp_1 - where_5;
  const auto sub_2 = sub - sub_1;
  const auto log_sigmoid_forward = logsigmoid_(sub_2);
  const auto mul = beta * log_sigmoid_forward;
  const auto sub_3 = div - mul;
  const auto mul_1 = -beta;
  const auto log_sigmoid_backward = (mul_1 * sigmoid_((-sub_2)));
  const auto neg_6 = -log_sigmoid_backward;
  const auto neg_7 = -neg_6;
  const auto where_6 = (gt_1 ? T(0.0) : neg_7);
  const auto where_7 = (gt_1 ? neg_7 : T(0.0));
  const auto add = (neg_4 + T(1.0));
  const auto div_3 = where_6 / add;
  const auto neg_8 = -div_3;
  const auto mul_2 = neg_8 * exp_1;
  const auto div_4 = where_7 / neg_3;
  const auto neg_9 = -div_4;
  const auto add_1 = (expm1_1 + T(1.0));
  const auto mul_3 = neg_9 * add_1;
  const auto where_8 = (gt_1 ? T(0.0) : mul_2);
  const auto add_2 = neg_6 + where_8;
  const auto where_9 = (gt_1 ? mul_3 : T(0.0));
  const auto add_3 = add_2 + where_9;
  const auto le = (div_2 <= T(-1e-06));
  const auto where_10 = (le ? add_3 : T(0.0));
  const auto div_5 = where_10 / n_l;
  const auto neg_10 = -log_sigmoid_backward;
  const auto where_11 = (gt ? T(0.0) : neg_10);
  const auto where_12 = (gt ? neg_10 : T(0.0));
  const auto add_4 = (neg_2 + T(1.0));
  const auto div_6 = where_11 / add_4;
  const auto neg_11 = -div_6;
  const auto mul_4 = neg_11 * exp;
  const auto div_7 = where_12 / neg_1;
  const auto neg_12 = -div_7;
  const auto add_5 = (expm1 + T(1.0));
  const auto mul_5 = neg_12 * add_5;
  const auto where_13 = (gt ? T(0.0) : mul_4);
  const auto add_6 = log_sigmoid_backward + where_13;
  const auto where_14 = (gt ? mul_5 : T(0.0));
  const auto add_7 = add_6 + where_14;
  const auto le_1 = (div_1 <= T(-1e-06));
  const auto where_15 = (le_1 ? add_7 : T(0.0));
  const auto div_8 = where_15 / n_w;
  const auto div_9 = (T(1.0) / n_w);
  const auto neg_13 = -div_9;
  const auto add_8 = div_8 + neg_13;
  return {sub_3, add_8, div_5};
}

// -m_w + beta [-m_w - log(1 - e^m_l)],  m_w = S_w / n_w,  m_l = min(S_l / n_l, -1e-6)
template <class T> SSPO_HD inline PairGrad<T> asft_formula(const PairScores<T>& s, const T* o) {
  const T u_w = s.u_w; (void)u_w;
  const T u_l = s.u_l; (void)u_l;
  const T n_w = s.n_w; (void)n_w;
  const T n_l = s.n_l; (void)n_l;
  const T margin = s.margin; (void)margin;
  const T label = s.label; (void)label;
  const T beta = o[0]; (void)beta;
  const auto div = u_w / n_w;
  const auto div_1 = u_l / n_l;
  const auto clamp = ((div_1 > T(-1e-06)) ? T(-1e-06) : div_1);
  const auto neg = -div;
  const auto neg_1 = -div;
  const auto gt = (clamp > T(-0.6931471805599453));
  const auto where = (gt ? clamp : T(-1.0));
  const auto where_1 = (gt ? T(-1.0) : clamp);
  const auto expm1 = expm1_(where);
  const auto neg_2 = -expm1;
  const auto log = log_(neg_2);
  const auto exp = exp_(where_1);
  const auto neg_3 = -exp;
  const auto log1p = log1p_(neg_3);
  const auto where_2 = gt ? log : log1p;
  const auto sub = neg_1 - where_2;
  const auto mul = beta * sub;
  const auto add = neg + mul;
  const auto neg_4 = -beta;
  const auto where_3 = (gt ? T(0.0) : neg_4);
  const auto where_4 = (gt ? neg_4 : T(0.0));
  const auto add_1 = (neg_3 + T(1.0));
  const auto div_2 = where_3 / add_1;
  const auto neg_5 = -div_2;
  const auto mul_2 = neg_5 * exp;
  const auto div_3 = where_4 / neg_2;
  const auto neg_6 = -div_3;
  const auto add_2 = (expm1 + T(1.0));
  const auto mul_3 = neg_6 * add_2;
  const auto where_5 = (gt ? T(0.0) : mul_2);
  const auto where_6 = (gt ? mul_3 : T(0.0));
  const auto add_3 = where_5 + where_6;
  const auto neg_7 = -beta;
  const auto add_4 = (neg_7 + T(-1.0));
  const auto le = (div_1 <= T(-1e-06));
  const auto where_7 = (le ? add_3 : T(0.0));
  const auto div_4 = where_7 / n_l;
  const auto div_5 = add_4 / n_w;
  return {add, div_5, div_4};
}

constexpr const char kFormulasHash[] = "d2c29a72dc670a2a";
constexpr int kNumPairFormulas = 26;
constexpr int kMaxOptions = 4;

template <class T> SSPO_HD inline PairGrad<T> pair_formula(int formula, const PairScores<T>& s, const T* o) {
  switch (formula) {
    case 0: return sigmoid_formula(s, o);
    case 1: return hinge_formula(s, o);
    case 2: return ipo_formula(s, o);
    case 3: return simpo_formula(s, o);
    case 4: return ipo_sum_formula(s, o);
    case 5: return sigmoid_norm_formula(s, o);
    case 6: return robust_formula(s, o);
    case 7: return exo_pair_formula(s, o);
    case 8: return discopop_formula(s, o);
    case 9: return sigmoid_forward_kl_formula(s, o);
    case 10: return sigmoid_js_divergence_formula(s, o);
    case 11: return sigmoid_alpha_divergence_formula(s, o);
    case 12: return flex_dpo_formula(s, o);
    case 13: return slic_formula(s, o);
    case 14: return nca_pair_formula(s, o);
    case 15: return bco_pair_formula(s, o);
    case 16: return sppo_hard_formula(s, o);
    case 17: return sppo_formula(s, o);
    case 18: return apo_zero_formula(s, o);
    case 19: return apo_down_formula(s, o);
    case 20: return sft_formula(s, o);
    case 21: return nll_formula(s, o);
    case 22: return nll_rejected_formula(s, o);
    case 23: return cpo_formula(s, o);
    case 24: return orpo_formula(s, o);
    case 25: return asft_formula(s, o);
    default: return {T(NAN), T(NAN), T(NAN)};
  }
}

}  // namespace sspo
