// Generated from sspo_ext/heads.py by `python -m sspo_ext.backends.generate`. Do not edit.
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
template <class T> SSPO_HD inline PairGrad<T> sigmoid_head(const PairScores<T>& s, const T* o) {
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
template <class T> SSPO_HD inline PairGrad<T> hinge_head(const PairScores<T>& s, const T* o) {
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
template <class T> SSPO_HD inline PairGrad<T> ipo_head(const PairScores<T>& s, const T* o) {
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
template <class T> SSPO_HD inline PairGrad<T> simpo_head(const PairScores<T>& s, const T* o) {
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

constexpr int kNumPairHeads = 4;
constexpr int kMaxOptions = 4;

template <class T> SSPO_HD inline PairGrad<T> pair_head(int head, const PairScores<T>& s, const T* o) {
  switch (head) {
    case 0: return sigmoid_head(s, o);
    case 1: return hinge_head(s, o);
    case 2: return ipo_head(s, o);
    case 3: return simpo_head(s, o);
    default: return {T(NAN), T(NAN), T(NAN)};
  }
}

}  // namespace sspo
